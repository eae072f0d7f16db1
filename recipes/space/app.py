"""A page to play with: a base that is guided by a proxy, beside the base alone and the proxy alone.

    python recipes/space/app.py

The page runs offline with the tiny pair of the repository. Elsewhere, or for another pair, set `KAD_BASE` and
`KAD_PROXY`, or write both names on the page: see the README beside this file.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

# No statistics of its use are sent. The libraries read this when they are imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from transformers_kad import RULES
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.recipes.playground.answers import (
    MAX_NEW_TOKENS,
    MAX_PROMPT,
    MAX_TEMPERATURE,
    Answer,
    Question,
    answer,
)
from transformers_kad.recipes.playground.controls import Control, make_controls, parameters_of
from transformers_kad.recipes.playground.pairs import LoadedPairs, pairs_from_environment
from transformers_kad.records.fragments import (
    chart_fragment,
    legend_fragment,
    message_fragment,
    plain_text_fragment,
    styles,
    text_fragment,
    totals_fragment,
)

TITLE = "Knapsack approximation deferral (KAD)"
ABOUT = (
    "A small aligned *proxy* guides a large *base* model: at every token the base keeps the probability of what it is "
    "sure of, and hands the rest to the proxy. [Paper](https://arxiv.org/abs/2510.27017)"
)
EXAMPLE = "Mia has 83 apples. She gives 47 to Jon. How many apples does Mia have now?"
CONTROLS = make_controls()
PAIR_HERE = Path(__file__).resolve().parents[1] / "tiny_pair"  # in a clone of the repository
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
HEAD = f"""<style>
{styles(".kad", ".dark .kad")}
.kad {{ border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; min-height: 4rem; }}
:is(#guided, #base-alone, #proxy-alone) .html-container {{ padding: 0; }}
:is(#base-alone, #proxy-alone) .text {{ font-size: .95rem; line-height: 1.6; }}
.kad .totals {{ margin-top: .7rem; }}
.kad .error {{ color: var(--mark); font-weight: 600; overflow-wrap: anywhere; }}
</style>"""


class Page:
    """The functions behind the page, and the visitors whose texts are being generated."""

    def __init__(self, pairs: LoadedPairs) -> None:
        self.pairs = pairs
        self._stops: dict[str, threading.Event] = {}  # by the session of the visitor

    def generate(
        self,
        request: gr.Request,
        prompt: str,
        base: str,
        proxy: str,
        rule: str,
        temperature: float,
        seed: float,
        max_new_tokens: float,
        *values: Any,
    ) -> Iterator[tuple[str, str, str]]:
        """Yield what the page shows of the three texts while they grow. `values` are those of `CONTROLS`."""
        session = str(request.session_hash)
        stop = self._stops[session] = threading.Event()
        try:
            parameters = parameters_of(rule, CONTROLS, values)
            question = Question(prompt, rule, parameters, temperature, int(seed or 0), int(max_new_tokens))
            yield in_boxes(message_fragment("Loading the models …"))
            pair = self.pairs.get(base, proxy)
            yield show(Answer(), pair.tokenizer)
            with closing(answer(pair, question, stop)) as steps:  # a visitor who leaves closes both generators
                for growing in steps:
                    yield show(growing, pair.tokenizer)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            yield in_boxes(message_fragment(str(error), is_error=True))
        finally:
            if self._stops.get(session) is stop:
                del self._stops[session]

    def stop(self, request: gr.Request) -> None:
        """End the texts of a visitor who asks for it or leaves."""
        if (stop := self._stops.get(str(request.session_hash))) is not None:
            stop.set()


def show(growing: Answer, tokenizer: Any) -> tuple[str, str, str]:
    """An answer as HTML: guided by KAD, of the base alone, and of the proxy alone."""
    trace = growing.guided
    if not trace:
        guided = message_fragment("Reading the prompt …")
    else:
        has_shares = any(record.proxy_share is not None for record in trace)
        guided = (
            chart_fragment(trace, number=1)
            + text_fragment(trace, tokenizer)
            + totals_fragment(len(trace), trace.statistics)
            + f'<div class="legend">{legend_fragment(has_shares=has_shares)}</div>'
        )
    return in_boxes(guided, *(plain_text_fragment(text) if text else "" for text in (growing.base, growing.proxy)))


def in_boxes(guided: str = "", base: str = "", proxy: str = "") -> tuple[str, str, str]:
    """The boxes of the three texts, in which the styles of the fragments apply."""
    return f'<div class="kad">{guided}</div>', f'<div class="kad">{base}</div>', f'<div class="kad">{proxy}</div>'


def make_component(control: Control) -> gr.Slider | gr.Dropdown:
    """The component of one parameter, which is visible while its rule is chosen."""
    common = {"label": control.name, "interactive": True, "elem_id": f"{control.rule}-{control.name}"}
    if control.choices:
        return gr.Dropdown(list(control.choices), value=control.default, **common)
    return gr.Slider(control.low, control.high, control.default, step=control.step, **common)


def build(pairs: LoadedPairs) -> gr.Blocks:
    """The page."""
    page, named = Page(pairs), pairs.offered
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {TITLE}\n\n{ABOUT}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                prompt = gr.Textbox(EXAMPLE, label="Prompt", lines=3, max_length=MAX_PROMPT, elem_id="prompt")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=100, elem_id="generate")
                    stop = gr.Button("Stop", min_width=100, elem_id="stop")
                rule = gr.Dropdown(list(RULES), value="dual", label="Rule", elem_id="rule")
                groups, components = [], []
                for name in RULES:
                    with gr.Group(visible=name == "dual", elem_id=f"parameters-{name}") as group:
                        components += [make_component(control) for control in CONTROLS if control.rule == name]
                    groups.append(group)
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(0, MAX_TEMPERATURE, 0, step=0.05, label="Temperature (0: greedy)")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                    length = gr.Slider(1, MAX_NEW_TOKENS, 64, step=1, label="Maximum of new tokens")
                with gr.Accordion("Models", open=not named.base):
                    open_fields = {"interactive": not pairs.is_fixed, "max_length": 500}
                    base = gr.Textbox(named.base, label="Base: Hub id or folder", elem_id="base", **open_fields)
                    proxy = gr.Textbox(named.proxy, label="Proxy: Hub id or folder", elem_id="proxy", **open_fields)
            with gr.Column(scale=2, min_width=300):
                gr.Markdown("### Guided by KAD")
                texts = [gr.HTML(in_boxes()[0], elem_id="guided", apply_default_css=False)]
                with gr.Row():
                    for name, title in (("base-alone", "The base alone"), ("proxy-alone", "The proxy alone")):
                        with gr.Column(min_width=260):
                            gr.Markdown(f"### {title}")
                            texts.append(gr.HTML(in_boxes()[1], elem_id=name, apply_default_css=False))
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        rule.change(lambda chosen: [gr.Group(visible=name == chosen) for name in RULES], rule, groups, **at_once)
        inputs = [prompt, base, proxy, rule, temperature, seed, length, *components]
        # While the texts grow, Gradio would drop a second click without a word, so the button is off until they end.
        start.click(lambda: gr.Button(interactive=False), None, start, **at_once).then(
            page.generate, inputs, texts, show_progress="minimal", show_progress_on=texts[0], api_visibility="private"
        ).then(lambda: gr.Button(interactive=True), None, start, **at_once)
        stop.click(page.stop, queue=False, api_visibility="private")
        blocks.unload(page.stop)
    return blocks


def launch(pairs: LoadedPairs, **settings: Any) -> gr.Blocks:
    """Serve the page, at `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`. `settings` are those of `gr.Blocks.launch`."""
    # One visitor's texts at a time; the others wait in the queue, which shows them their place.
    blocks = build(pairs).queue(default_concurrency_limit=1, max_size=32)
    blocks.launch(
        theme=THEME, head=HEAD, ssr_mode=False, run_history=False, enable_monitoring=False, footer_links=[], **settings
    )
    return blocks


if __name__ == "__main__":
    silence_libraries()
    launch(pairs_from_environment(os.environ, PAIR_HERE))
