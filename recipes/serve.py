# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[quantization,serve]", "accelerate"]
# ///
"""Serve a base that is guided by a proxy to every client of the OpenAI interface.

    python recipes/serve.py --base BASE --proxy PROXY --rule dual --threshold 0.4

With the settings of an aligned proxy (its `kad_config.json` also names base and proxy):

    python recipes/serve.py --config my_proxy --port 8000

    from openai import OpenAI

    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    client.chat.completions.create(model="BASE", messages=[{"role": "user", "content": "Why is the sky blue?"}])

The endpoints are those of `transformers serve`: /v1/chat/completions, /v1/completions and /v1/responses, all of them
also streamed. The body of a request may name its rule, `"kad": {"rule": "dual", "parameters": {"threshold": 0.6}}`, or
ask for the base alone, `"kad": false`. Its usage figures tell the drafted and the accepted tokens.

Requests are answered one after the other, sampled from the target r unless their temperature is 0.
"""

import sys
from dataclasses import dataclass, field

from transformers_kad import KADConfig
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.recipes.arguments import ModelArguments, RuleArguments, template_arguments
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.serving import serve


@dataclass
class ServerArguments:
    """Where the server listens, and how it answers."""

    host: str = field(default="localhost", metadata={"help": "Address to listen at."})
    port: int = field(default=8000, metadata={"help": "Port to listen at; 0 for a free one."})
    name: str | None = field(
        default=None, metadata={"help": "Name of the model for clients. Default: the base's Hub id, or its folder's."}
    )
    speculative: bool = field(
        default=True,
        metadata={"help": "Speculative decoding: the proxy drafts, which is faster and gives the same distribution."},
    )
    template_arguments: str | None = field(
        default=None,
        metadata={"help": "Further arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."},
    )
    enable_cors: bool = field(default=False, metadata={"help": "Let web pages of every origin ask the server."})
    continuous_batching: bool = field(
        default=False, metadata={"help": "Refused: continuous batching knows no drafts."}
    )

    def __post_init__(self) -> None:
        self.template = template_arguments(self.template_arguments)
        if self.continuous_batching:
            raise ValueError(
                "--continuous_batching is not available: the continuous batching of transformers takes no processor "
                "from the server and emits one token for each request and step, so that KAD could not draft. Leave "
                "it out: requests are answered one after the other."
            )


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and serve."""
    models, rule, server = parse_arguments([ModelArguments, RuleArguments, ServerArguments], __doc__, argv)
    silence_libraries()

    def run() -> None:
        config: KADConfig = rule.to_config()
        models.complete(config, rule.config)
        serve(
            models,
            config,
            host=server.host,
            port=server.port,
            name=server.name,
            speculative=server.speculative,
            chat_template_kwargs=server.template,
            enable_cors=server.enable_cors,
        )

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
