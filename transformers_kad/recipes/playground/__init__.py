"""What the page of `recipes/space` does, without the page: controls of the rules, loaded pairs, growing answers."""
