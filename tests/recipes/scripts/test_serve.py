"""The recipe that serves: its options, and a server from its command line."""

import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import serve
from command_lines import error_of
from run_command import SECONDS

from transformers_kad import KADConfig
from transformers_kad.integrations.serving import build_app
from transformers_kad.recipes.serving import make_app
from transformers_kad.recipes.word_problems import make_problems

SCRIPT = Path(serve.__file__)
PAIR = SCRIPT.parent / "tiny_pair"
MODELS = ["--base", str(PAIR / "base"), "--proxy", str(PAIR / "proxy"), "--device", "cpu"]
BUILD_APP = inspect.signature(build_app).parameters
QUESTION = make_problems("test", 1, seed=2)[0].question


@pytest.fixture
def served(monkeypatch):
    """What the server would be started with."""
    calls = []
    monkeypatch.setattr(serve, "serve", lambda models, config, **settings: calls.append((models, config, settings)))
    return calls


def test_models_and_rule_come_from_options_or_from_a_config(served, tmp_path):
    assert serve.main([*MODELS, "--rule", "primal", "--budget", "0.8", "--port", "1234", "--name", "guided"]) == 0
    saved = KADConfig("nudging", {"threshold": 0.7}, base=str(PAIR / "base"), proxy=str(PAIR / "proxy"))
    saved.save_pretrained(tmp_path)
    assert serve.main(["--config", str(tmp_path), "--no_speculative"]) == 0
    (_, config, settings), (models, other, others) = served
    assert config == KADConfig("primal", {"budget": 0.8})
    assert (settings["port"], settings["name"], settings["speculative"]) == (1234, "guided", True)
    assert set(settings) - {"host", "port"} <= {*inspect.signature(make_app).parameters, *BUILD_APP}
    assert (models.base, models.proxy, other) == (saved.base, saved.proxy, saved)
    assert (others["port"], others["name"], others["speculative"]) == (8000, None, False)


@pytest.mark.parametrize("option", ["--continuous_batching", "--continuous-batching"])
def test_continuous_batching_is_refused_with_the_reason(served, capsys, option):
    with pytest.raises(SystemExit) as caught:
        serve.main([*MODELS, option])
    assert caught.value.code == 2
    assert "emits one token for each request and step, so that KAD could not draft" in capsys.readouterr().err
    assert not served


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "1.5"], "1.5"),
        (["--base", "./missing"], "./missing"),
        (["--template_arguments", "[]"], "--template_arguments must be a JSON object"),
    ],
)
def test_errors_are_told_in_one_line(capsys, options, message):
    assert message in error_of(serve.main, [*MODELS, *options], capsys).splitlines()[-1]


@pytest.mark.slow
def test_a_copy_of_the_script_serves_until_it_is_interrupted(tmp_path):
    copy = shutil.copy(SCRIPT, tmp_path / "script.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, copy, *MODELS, "--threshold", "0.6", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                    break
            assert found, "".join(lines)
            assert "Rule: DualDeferral(threshold=0.6)" in "".join(lines)
            client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0, timeout=SECONDS)
            answer = client.chat.completions.create(
                model="base", messages=[{"role": "user", "content": QUESTION}], temperature=0
            )
            assert re.fullmatch(r"We get .* The answer is \d+\.", answer.choices[0].message.content)
            assert answer.usage.kad["accepted_tokens"]
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=SECONDS)
            assert process.returncode in (0, 130, -signal.SIGINT)
        finally:
            process.kill()
