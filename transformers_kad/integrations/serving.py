"""An OpenAI-compatible server: the endpoints of `transformers serve` for one base, guided by a proxy.

Needs `pip install -e ".[serve]"`. The endpoints, streaming, stop strings and penalties are those of `transformers
serve` (`transformers.cli.serving`), which calls `model.generate` in one thread, one request after the other. What is
added here is a field `kad` in the body of a request, which names its rule, and another in its usage figures.

What this module uses of `transformers.cli.serving` is no public interface. `tests/integrations/test_serving.py` says
what has moved when a new version changes it.
"""

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import asdict
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if any(find_spec(name) is None for name in ("fastapi", "openai", "pydantic", "uvicorn")):
    raise ImportError('The packages of the server are missing: pip install -e ".[serve]"')

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ..configuration import KADConfig
from ..decoding.attachment import attach
from ..logits_process import KADLogitsProcessor
from ..models.model_errors import ContextLengthError
from ..records.statistics import KADStatistics
from .loading.configuration import OWN_SETTINGS
from .requests import config_of_request, tokens_that_fit

MakeProcessor = Callable[[KADConfig], KADLogitsProcessor]
RULES_AT_HAND = 8  # processors that are kept for the rules of requests


class _Call:
    """One request: what guides it, and what came of it.

    Args:
        config: its settings; None for the base alone.
        processor: guides it; None for the base alone.
        seed: of the random numbers; None to go on with those of the request before.
        keeps_cache: whether the processor is to keep the proxy's cache for the next request.
    """

    def __init__(
        self, config: KADConfig | None, processor: KADLogitsProcessor | None, seed: int | None, *, keeps_cache: bool
    ) -> None:
        self.config = config
        self.processor = processor
        self.seed = seed
        self.keeps_cache = keeps_cache
        self._statistics: Future[KADStatistics | None] = Future()

    def generate(self, model: PreTrainedModel, **arguments: Any) -> Any:
        """`model.generate` for this request, in the thread that all requests share."""
        statistics = None
        try:
            self._fit_into_context(model, arguments)
            if self.seed is not None:
                torch.manual_seed(self.seed)
            result = model.generate(**arguments, kad=False if self.processor is None else self.processor)
            if self.processor is not None:
                statistics = self.processor.statistics
            return result
        finally:
            if self.processor is not None and not self.keeps_cache:
                self.processor.reset()
            self._statistics.set_result(statistics)

    def _fit_into_context(self, model: PreTrainedModel, arguments: dict[str, Any]) -> None:
        """End the answer where the context of either model ends, which clients are told as the reason `length`.

        The configuration is the request's own, in which the handler looks for the limit afterwards.
        """
        proxy = None if self.processor is None else self.processor.proxy
        prompt, settings = arguments["input_ids"].shape[-1], arguments["generation_config"]
        if settings.max_new_tokens is not None:
            settings.max_new_tokens = tokens_that_fit(settings.max_new_tokens, prompt, model, proxy)

    async def usage(self) -> dict[str, Any] | None:
        """What the usage figures of the request say of KAD, once it is decoded; None without KAD."""
        statistics = await asyncio.shield(asyncio.wrap_future(self._statistics))
        if statistics is None or self.config is None:
            return None
        return {
            "rule": self.config.rule,
            "parameters": asdict(self.config.make_rule()),
            "drafted_tokens": statistics.drafted,
            "accepted_tokens": statistics.accepted,
            "deferral_mass": statistics.deferral_mass,
            "base_forwards": statistics.base_forwards,
            "proxy_forwards": statistics.proxy_forwards,
        }


# The request that the current task answers. Every request has a task of its own.
_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)


class _GuidedModel:
    """Stands in for the base in one request, whose `generate` it guides."""

    def __init__(self, model: PreTrainedModel, call: _Call) -> None:
        self._model, self._call = model, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **arguments: Any) -> Any:
        """See `_Call.generate`."""
        return self._call.generate(self._model, **arguments)


class _OneModel(ModelManager):
    """Has one model, which is loaded already and is never unloaded."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__()
        self.force_model = name  # requests for another one are refused
        self._model, self._tokenizer = model, tokenizer
        self._created = int(time.time())

    def load_model_and_processor(
        self, model_id_and_revision: str, *_: object, **__: object
    ) -> tuple[Any, PreTrainedTokenizerBase]:
        if model_id_and_revision != self.process_model_name(self.force_model):
            raise ValueError(f"This server has the model {self.force_model!r} alone, got {model_id_and_revision!r}.")
        call = _CALL.get()
        return self._model if call is None else _GuidedModel(self._model, call), self._tokenizer

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": self._created, "owned_by": "transformers_kad"}]

    get_gen_models = list_models  # its name before transformers 5.24

    def shutdown(self) -> None:
        pass


class _GuidedHandler:
    """Put before a handler of `transformers serve`: reads `kad` in a request's body, and adds to its usage figures."""

    guidance: "_Guidance"

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        body = dict(body)
        try:
            # The seed is set where the random numbers are drawn: here it would change those of a running request.
            call = self.guidance.call(body.pop("kad", None), body.pop("seed", None))
        except (TypeError, ValueError) as error:
            return _error(400, str(error))
        _CALL.set(call)
        try:
            response = await super().handle_request(body, request_id)  # type: ignore[misc]  # of the handler behind
        except ContextLengthError as error:
            return _error(400, str(error))
        except HTTPException as error:
            return _error(error.status_code, error.detail)
        if isinstance(response, StreamingResponse):
            response.body_iterator = _completed(response.body_iterator, call)
            return response
        content = json.loads(response.body)
        await _add_usage(content, call)
        return JSONResponse(content, status_code=response.status_code)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(_error_content(message), status_code=status)


def _error_content(message: str) -> dict[str, Any]:
    """An error in the form in which clients of the OpenAI interface look for its message."""
    return {"error": {"message": message, "type": "invalid_request_error"}}


class _Chat(_GuidedHandler, ChatCompletionHandler):
    pass


class _Completion(_GuidedHandler, CompletionHandler):
    pass


class _Responses(_GuidedHandler, ResponseHandler):
    pass


class _NotGuided:
    """An endpoint of `transformers serve` that does not generate text, and would answer with the base alone."""

    async def handle_request(self, *_: object) -> Response:
        return _error(404, "This server guides /v1/chat/completions, /v1/completions and /v1/responses alone.")


async def _add_usage(content: dict[str, Any], call: _Call) -> bool:
    """Add what KAD did to the usage figures in the content of an answer; whether there are any."""
    inner = content.get("response")
    figures = content.get("usage") or (inner.get("usage") if isinstance(inner, dict) else None)
    if not isinstance(figures, dict):
        return False
    usage = await call.usage()
    if usage is not None:
        figures["kad"] = usage
    return True


async def _completed(parts: Any, call: _Call) -> AsyncIterator[str]:
    """The server-sent events of an answer, with usage figures and errors as clients read them."""
    async with aclosing(parts):  # a client that leaves closes this generator, and with it the handler's
        async for part in parts:
            events = [await _completed_event(event, call) for event in re.split(r"(?<=\n\n)", part)]
            yield "".join(events)


async def _completed_event(event: str, call: _Call) -> str:
    """One event: usage figures get what KAD did, an error gets the form in which clients look for its message."""
    if event.startswith(_ERROR_EVENT):  # which transformers writes without escaping the message
        content: dict[str, Any] = _error_content(event.removeprefix(_ERROR_EVENT).removesuffix('"}\n\n'))
    elif '"usage"' in event:
        content = json.loads(event.removeprefix("data: "))
        if not await _add_usage(content, call):
            return event
    else:
        return event
    return f"data: {json.dumps(content)}\n\n"


_ERROR_EVENT = 'data: {"error": "'  # how handlers begin the event of an error


class _Guidance:
    """Makes the processors of requests, and keeps those of the rules that were asked for last."""

    def __init__(self, config: KADConfig, make_processor: MakeProcessor) -> None:
        if config.lazy:
            raise ValueError(
                "`lazy=True` draws its tokens, and requests with temperature 0 are decoded greedily: serve with "
                "settings without `lazy`."
            )
        self.config = config
        self.default = make_processor(config)
        self._others = lru_cache(RULES_AT_HAND)(make_processor)

    def call(self, asked: object, seed: object) -> _Call:
        """A request with these fields of its body; the errors are those of `config_of_request`."""
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"`seed` must be an integer, got {seed!r:.200}.")
        config = config_of_request(self.config, asked, ("rule", "parameters", *OWN_SETTINGS))
        if config is None:
            return _Call(None, None, seed, keeps_cache=True)
        is_default = config == self.config
        processor = self.default if is_default else self._others(config)
        return _Call(config, processor, seed, keeps_cache=is_default)


def build_app(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: KADConfig,
    make_processor: MakeProcessor,
    *,
    name: str,
    speculative: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    enable_cors: bool = False,
) -> FastAPI:
    """The application of a server that answers with one base, guided by the processors of a proxy.

    The processor of the settings is attached to the base (see `attach`). Sampling that a request does not set is that
    of `base.generation_config`, and one with temperature 0 is decoded greedily. A request is decoded by the time the
    one before it has ended.

    Args:
        base: the base.
        tokenizer: its tokenizer, with a chat template for the endpoints that take chats.
        config: the settings of requests that name none.
        make_processor: builds a processor with given settings. All share the proxy.
        name: the model that clients ask for.
        speculative: decode with drafts of the proxy.
        chat_template_kwargs: further arguments of the chat template, where a request has none of its own.
        enable_cors: let web pages of every origin ask the server.

    Raises:
        ValueError: settings with `lazy`, or what `attach` refuses.
    """
    guidance = _Guidance(config, make_processor)
    attach(base, guidance.default, speculative=speculative)
    manager, state = _OneModel(base, tokenizer, name), GenerationState()
    template = {"chat_template_kwargs": chat_template_kwargs}
    handlers = (_Chat(manager, state, **template), _Completion(manager, state), _Responses(manager, state, **template))
    for handler in handlers:
        handler.guidance = guidance
    chat, completion, responses = handlers
    return build_server(
        manager,
        chat,
        completion_handler=completion,
        response_handler=responses,
        transcription_handler=_NotGuided(),
        systemone_handler=_NotGuided(),
        generation_state=state,
        enable_cors=enable_cors,
    )


class BackgroundServer:
    """A server in a thread of this process, for notebooks and tests.

    Args:
        app: what `build_app` returns.
        host: the address to listen at.
        port: the port; 0 for a free one.

    Attributes:
        url: the address, such as "http://127.0.0.1:8000".
    """

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise OSError(f"The server could not be started at {host}:{port}.")
            time.sleep(0.01)
        self.url = f"http://{host}:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        """End the requests that are answered, and the server."""
        self._server.should_exit = True
        self._thread.join()
