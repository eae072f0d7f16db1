# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval]"]
# ///
r"""Compare rules on the same questions: accuracy with intervals, speed, acceptance and deferral.

The tiny pair on its own held-out problems, some minutes on 2 CPU cores:

    python recipes/run_eval.py --task tiny --method base proxy nudging:threshold=0.7 kad-dual:threshold=0.4

Any pair on public tasks, each model a Hub id or a folder:

    python recipes/run_eval.py --base allenai/OLMo-2-1124-13B --proxy allenai/OLMo-2-0425-1B-Instruct \
        --task gsm8k math500 --method base proxy kad-primal:budget=0.8 kad-dual:threshold=0.3,0.4 --output results

Several GPUs, each with a copy of the models: `torchrun --nproc_per_node 8 recipes/run_eval.py ...`, or also with
`--nnodes 2 ...` on several machines that share the folder of --output. The results do not depend on the number of
processes. The same command continues an interrupted run, and a finished --output can be extended by more methods,
tasks or samples.

Tasks: gsm8k, mmlu, truthfulqa_mc1, math500, svamp, arc_challenge, commonsense_qa, tiny; instructions and ifeval
(instructions that a program can check), cnn_dailymail (summaries, by ROUGE), chat (the prompts of --prompts, without
right answers).

Quality beside accuracy: --quality adds perplexity under a judge (--judge or --aligned), rewards and preferences
(--reward_model), distinct-n, repetition, length and form of the same texts, also to a finished --output, without
decoding again.

Methods: base, proxy, aligned (the model that --aligned names), assisted (assisted decoding of transformers), nudging,
kad-primal, kad-dual, kad-exact, confidence-bet, cascade-diff, cascade-opt, cascade-token-v2, cascade-token-v3,
kad-paced, implicit-reward, ensemble, blend-in, config (the rule of --config). With parameters: kad-dual:threshold=0.4.
Several values make several methods: kad-dual:threshold=0.3,0.4:num_assistant_tokens=3,5.

The results folder gets results.jsonl (a line for each instance, method and sample), the tables as summary.json and
summary.md, and plots as PNG and SVG.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.evaluation.arguments import EvaluationArguments, EvaluationSampling, MethodArguments
from transformers_kad.recipes.evaluation.quality import QualityArguments
from transformers_kad.recipes.evaluation.session import evaluate

TINY_PAIR = Path(__file__).resolve().parent / "tiny_pair"


@dataclass
class RecordArguments:
    """What to record."""

    positions: bool = field(
        default=False, metadata={"help": "Record the deferral mass at every position in results.jsonl."}
    )
    retry_failed: bool = field(
        default=False, metadata={"help": "Answer questions again that failed in an earlier run."}
    )


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    types = (
        *(ModelArguments, EvaluationArguments, MethodArguments, EvaluationSampling),
        *(QualityArguments, RecordArguments),
    )
    models, evaluation, chosen, sampling, quality, record = parse_arguments(types, __doc__, argv)
    silence_libraries()

    def run() -> None:
        evaluate(models, evaluation, chosen, sampling, default_pair=TINY_PAIR, quality=quality, **vars(record))

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
