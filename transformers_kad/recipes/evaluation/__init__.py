"""Tasks, answers and the engine that scores a pair of models on them. Needs `pip install -e ".[eval]"`."""
