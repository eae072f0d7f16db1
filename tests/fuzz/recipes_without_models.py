"""What stands for the models in recipes that are run hundreds of times: answers that are made from the seed."""

from types import SimpleNamespace

import generate

from transformers_kad import KADStatistics
from transformers_kad.recipes.evaluation.decoding import Answer
from transformers_kad.records.statistics import SequenceStatistics

PROMPTS = (
    "Ada has 1 hat.\n"
    '{"prompt": "Why?", "id": 7}\n'
    "\n"
    '{"messages": [{"role": "user", "content": "Wer?"}], "tools": [{"name": "sum"}]}\n'
    "Déjà vu\n"
    '{"prompt": "So", "chat_template_kwargs": {"brief": true}, "more": [1, 2.5, {"a": null}]}\n'
)


class Echo(generate.Generator):
    """Answers with the seed, without any model."""

    def __init__(self, models, config, sampling, **_):
        self.sampling = sampling
        self.kad = SimpleNamespace(statistics=KADStatistics(tokens=1))

    def check_template(self, template, arguments):
        pass

    def answer(self, prompt, arguments, seed, streamer=None, template=None):
        return [seed]

    def text(self, ids):
        return str(ids[0])

    def ended(self, ids):
        return True


class EchoDecoder:
    """Answers with the seed, without any model."""

    def __init__(self):
        models = SimpleNamespace(
            base="b", proxy="q", reference=None, dtype="auto", quantization=None, align_vocabularies=False
        )
        self.pair = SimpleNamespace(models=models, device="cpu", base=SimpleNamespace(dtype="float32"))
        self.settings, self.speculative, self.aligned = {"do_sample": True}, False, None
        self.chat, self.proxy_chat, self.template_arguments = None, "same", {}

    def prepare(self, method):
        pass

    def answer(self, method, prompts, seed, max_new_tokens):
        drafts = SequenceStatistics(tokens=3, rounds=2, drafted=4, accepted=1, deferral_mass=0.5)
        statistics = None if method.config is None else drafts
        return [Answer(f"The answer is {(seed + at) % 100}.", True, 3, 0.25, statistics) for at in range(len(prompts))]
