"""Every documented way to use the library, as the first lines of a fresh process.

One process loads torch, transformers, peft and the models, but not this library. Each example runs in a fork of it, so
that its own `import transformers_kad` is the first one of a process. Greedy texts are compared with a computation that
uses neither this library nor a cache.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from run_command import run_command

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="examples run in forks of a process")

IMPORT = "from transformers_kad import DualDeferral, KADLogitsProcessor\n"
GREEDY = "do_sample=False, max_new_tokens=10"
DRAW = "do_sample=True, top_k=0, max_new_tokens=10"

# Each leaves `ids` and `kad`. Those in WORKS give the expected greedy text; "{text}" is one prompt or a padded batch.
WORKS = {
    "built before the call": "kad = KADLogitsProcessor(proxy, DualDeferral(threshold=0.4))\n"
    "ids = base.generate(**{text}, logits_processor=[kad], {settings})",
    "built in the call": "ids = base.generate(**{text}, "
    "logits_processor=[kad := KADLogitsProcessor(proxy, DualDeferral(threshold=0.4))], {settings})",
    "built in the call, rule by name": "ids = base.generate(**{text}, "
    "logits_processor=[kad := KADLogitsProcessor(proxy, 'dual', threshold=0.4)], {settings})",
    "from a config in the call": "from transformers_kad import KADConfig\n"
    "ids = base.generate(**{text}, logits_processor=[kad := KADLogitsProcessor.from_config(proxy, KADConfig())], "
    "{settings})",
    "in a LogitsProcessorList": "from transformers import LogitsProcessorList\n"
    "kad = KADLogitsProcessor(proxy)\n"
    "ids = base.generate(**{text}, logits_processor=LogitsProcessorList([kad]), {settings})",
    "with a trace": "ids = base.generate(**{text}, logits_processor=[kad := KADLogitsProcessor(proxy, trace=True)], "
    "{settings})\nassert kad.trace",
    "a prompt of the proxy's own": "kad = KADLogitsProcessor(proxy)\n"
    "with kad.proxy_prompt({text}):\n    ids = base.generate(**{text}, logits_processor=[kad], {settings})",
    "a base with an adapter": "ids = adapted_base.generate(**{text}, "
    "logits_processor=[kad := KADLogitsProcessor(proxy)], {settings})",
    "a model whose generate calls super().generate": "base.__class__ = WithOwnGenerate\n"
    "ids = base.generate(**{text}, logits_processor=[kad := KADLogitsProcessor(proxy)], {settings})",
    "generate looked up on the class": "ids = type(base).generate(base, **{text}, "
    "logits_processor=[kad := KADLogitsProcessor(proxy)], {settings})",
    "the package reloaded": "import importlib, transformers_kad\nimportlib.reload(transformers_kad)\n"
    "ids = base.generate(**{text}, logits_processor=[kad := KADLogitsProcessor(proxy)], {settings})",
    "every module reloaded": "import importlib\n"
    "for name in sorted(n for n in sys.modules if n.startswith('transformers_kad')):\n"
    "    importlib.reload(sys.modules[name])\n"
    "from transformers_kad.logits_process import KADLogitsProcessor\n"
    "ids = base.generate(**{text}, logits_processor=[kad := KADLogitsProcessor(proxy)], {settings})",
}
PATHS = {
    "token by token": "{settings}",
    "speculative": "{settings}, assistant_model=proxy",
}

# Ways that take one prompt, with the path in them.
SINGLE = {
    "custom_generate=kad_generate": "from transformers_kad import kad_generate\n"
    f"ids = base.generate(**one, logits_processor=[kad := KADLogitsProcessor(proxy)], {GREEDY}, "
    "custom_generate=kad_generate)\nassert kad.statistics.drafted",
    "kad_generate of a reloaded module": "import importlib, transformers_kad.decoding.speculative\n"
    "importlib.reload(transformers_kad.decoding.speculative)\n"
    "from transformers_kad.decoding.speculative import kad_generate\n"
    f"ids = base.generate(**one, logits_processor=[kad := KADLogitsProcessor(proxy)], {GREEDY}, "
    "custom_generate=kad_generate)\nassert kad.statistics.drafted",
    "prompt lookup": f"ids = base.generate(**one, logits_processor=[kad := KADLogitsProcessor(proxy, "
    f"drafter='prompt_lookup')], assistant_model=proxy, {GREEDY})",
    "automatic draft lengths": f"ids = base.generate(**one, logits_processor=[kad := KADLogitsProcessor(proxy, "
    f"num_assistant_tokens='auto')], assistant_model=proxy, {GREEDY})",
    "a pipeline": "from transformers import pipeline\n"
    "kad = KADLogitsProcessor(proxy)\n"
    "made = pipeline('text-generation', model=base, tokenizer=tokenizer)(text, logits_processor=[kad], "
    f"assistant_model=proxy, {GREEDY}, return_tensors=True)\n"
    "ids = torch.tensor([made[0]['generated_token_ids']])\nassert kad.statistics.drafted",
    "a pipeline, built in the call": "from transformers import pipeline\n"
    "made = pipeline('text-generation', model=base, tokenizer=tokenizer)(text, "
    f"logits_processor=[kad := KADLogitsProcessor(proxy)], {GREEDY}, return_tensors=True)\n"
    "ids = torch.tensor([made[0]['generated_token_ids']])",
}

# Sampled: what is checked is that the call knows of KAD, from its statistics.
SAMPLED = {
    "lazy": f"base.generate(**one, logits_processor=[kad := KADLogitsProcessor(proxy, lazy=True)], {DRAW})",
    "sampled": f"base.generate(**one, logits_processor=[kad := KADLogitsProcessor(proxy)], {DRAW})",
    "sampled, speculative": f"base.generate(**one, logits_processor=[kad := KADLogitsProcessor(proxy)], {DRAW}, "
    "assistant_model=proxy)",
    "several sequences": f"base.generate(**batch, logits_processor=[kad := KADLogitsProcessor(proxy)], {DRAW}, "
    "assistant_model=proxy, num_return_sequences=2)",
    "beams": "base.generate(**batch, logits_processor=[kad := KADLogitsProcessor(proxy)], num_beams=2, "
    "do_sample=False, max_new_tokens=10)",
    "implicit reward": "base.generate(**one, logits_processor=[kad := KADLogitsProcessor(adapted_proxy, "
    f"'implicit_reward', beta=1.0)], assistant_model=adapted_proxy, {GREEDY})",
    "another tokenizer": "from transformers_kad import align_vocabularies\n"
    "base.generate(**one, logits_processor=[kad := KADLogitsProcessor(proxy, "
    f"vocabulary_alignment=align_vocabularies(tokenizer, tokenizer))], assistant_model=proxy, {GREEDY})",
}

# A `generate` that was taken before the import runs transformers' own code, which would take padding for text.
REFUSED = {
    "a bound method taken before": f"bound(**batch, logits_processor=[KADLogitsProcessor(proxy)], {GREEDY})",
    "a bound method taken before, with an assistant": "bound(**one, logits_processor=[KADLogitsProcessor(proxy)], "
    f"assistant_model=proxy, {GREEDY})",
    "a class that copied generate before": "base.__class__ = WithCopiedGenerate\n"
    f"base.generate(**batch, logits_processor=[KADLogitsProcessor(proxy)], {GREEDY})",
    "the import within the arguments": "base.generate(**batch, logits_processor=[__import__('transformers_kad')."
    f"KADLogitsProcessor(proxy)], {GREEDY})",
    "a class with a loop of its own": "base.__class__ = WithOwnLoop\n"
    "base.generate(batch['input_ids'], logits_processor=[KADLogitsProcessor(proxy)])",
}


def examples() -> dict[str, tuple[str, str]]:
    """Name: (kind, program)."""
    made = {}
    for name, line in WORKS.items():
        for path, settings in PATHS.items():
            for text in ("one", "batch"):
                program = IMPORT + line.format(text=text, settings=settings.format(settings=GREEDY))
                program += f"\nassert bool(kad.statistics.drafted) is {path == 'speculative'}"
                made[f"{name}, {path}, {text}"] = (text, program)
    made |= {name: ("one", IMPORT + line) for name, line in SINGLE.items()}
    made |= {name: ("sampled", IMPORT + line) for name, line in SAMPLED.items()}
    for name, line in REFUSED.items():
        made[name] = ("refused", line if "__import__" in line else IMPORT + line)
    return made


PARENT = """
import json, os, sys, traceback
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained("recipes/tiny_pair/base", padding_side="left")
base = AutoModelForCausalLM.from_pretrained("recipes/tiny_pair/base").eval()
adapted_proxy = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained("recipes/tiny_pair/reference"), "recipes/tiny_pair/proxy"
).eval()
proxy = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained("recipes/tiny_pair/reference"), "recipes/tiny_pair/proxy"
).eval().merge_and_unload()
adapted_base = get_peft_model(
    AutoModelForCausalLM.from_pretrained("recipes/tiny_pair/base"), LoraConfig(task_type="CAUSAL_LM", r=2)
).eval()
base.generation_config.eos_token_id = adapted_base.generation_config.eos_token_id = None
proxy.generation_config.eos_token_id = adapted_proxy.generation_config.eos_token_id = None
text = "Mia has 34 apples. Jon brings 28 more."
one = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
batch = tokenizer([text, "Ann has 7"], return_tensors="pt", padding=True, return_token_type_ids=False)
bound = base.generate


class WithOwnGenerate(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)


class WithCopiedGenerate(LlamaForCausalLM):
    generate = LlamaForCausalLM.generate


class WithOwnLoop(LlamaForCausalLM):
    def generate(self, input_ids, logits_processor=()):
        for processor in logits_processor:
            scores = processor(input_ids, self(input_ids).logits[:, -1])


@torch.no_grad()
def expected(ids, length=10):
    for _ in range(length):
        p, q = (model(ids).logits[:, -1].softmax(-1) for model in (base, proxy))
        deferred = p < 0.4
        r = p * ~deferred + (p * deferred).sum() * q
        ids = torch.cat([ids, r.argmax(-1, keepdim=True)], dim=-1)
    return ids[0, -length:].tolist()


texts = [expected(one["input_ids"]), expected(tokenizer("Ann has 7", return_tensors="pt")["input_ids"])]
assert "transformers_kad" not in sys.modules
for name, (kind, program) in json.load(sys.stdin).items():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            scope = dict(globals())
            exec(program, scope)
            if kind == "sampled":
                outcome = scope["kad"].statistics.tokens > 0
            elif kind == "refused":
                outcome = "ran"
            else:
                wanted = texts[:1] if kind == "one" else texts
                got = scope["ids"][:, -10:].tolist()
                outcome = True if got == wanted else f"{got} instead of {wanted}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}" if kind == "refused" else traceback.format_exc()
        os.write(writing, json.dumps(outcome).encode()[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        print(json.dumps([name, pipe.read()]), flush=True)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    run = run_command([sys.executable, "-c", PARENT], standard_input=json.dumps(examples()), cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return {name: json.loads(outcome) for name, outcome in map(json.loads, run.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("name", examples())
def test_the_first_lines_of_a_process(outcomes, name):
    kind, program = examples()[name]
    if kind == "refused":
        assert outcomes[name].startswith("RuntimeError: This KAD processor is in the list of a `generate`"), program
    else:
        assert outcomes[name] is True, f"{program}\n{outcomes[name]}"
