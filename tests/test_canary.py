"""What the library uses of transformers, torch, peft and accelerate that they do not promise to keep.

A failure names what has moved, the module of the library that uses it, and the installed version. Continuous batching
and the server have tests of the same kind beside their own (`integrations/test_continuous_batching.py`,
`integrations/test_serving.py`). If the package can't be imported any more, run this module without it:

    python -m pytest --noconftest -n 0 tests/test_canary.py
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel, cache_utils
from transformers.generation import PromptLookupCandidateGenerator
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from versions import IS_5_24, LIST_MODELS

PACKAGE = Path(__file__).parents[1] / "transformers_kad"
LIBRARIES = ("transformers", "torch", "peft", "accelerate")


def moved(thing: str, what: str, used_by: str) -> str:
    """The message about one thing, whose name begins with that of its library."""
    library = thing.split(".", maxsplit=1)[0]
    return f"{library} {version(library)}: `{thing}` {what}. transformers_kad/{used_by} relies on it."


def resolve(path: str) -> Any:
    """The module, class or function with a dotted name; `AttributeError` or `ImportError` if there is none."""
    names = path.split(".")
    for count in range(len(names), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(names[:count]))
        except ModuleNotFoundError as error:
            if not ".".join(names).startswith(str(error.name)):
                raise
            continue
        for name in names[count:]:
            found = getattr(found, name)
        return found
    raise ImportError(f"There is no {path}.")


# --- What is imported --------------------------------------------------------------------------------------------


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The dotted names that code imports from the libraries, but for those whose absence it expects."""
    expected = [n for n in ast.walk(tree) if isinstance(n, ast.Try) and n.handlers]
    skipped = {id(inner) for n in expected for part in n.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and id(node) not in skipped:
            is_theirs = str(node.module).split(".")[0] in LIBRARIES
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_theirs)


def missing_imports(source: str, used_by: str) -> list[str]:
    """Messages about what a module of the library imports in vain."""
    messages = []
    for path in imports_of(ast.parse(source)):
        try:
            resolve(path)
        except (AttributeError, ImportError):
            messages.append(moved(path, "can't be imported", used_by))
    return messages


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_everything_that_is_imported_exists(path):
    messages = missing_imports(path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE)))
    assert not messages, "\n".join(messages)


# --- Attributes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attributes:
    """Attributes that the library reads or writes.

    Attributes:
        owner: the dotted name of the class, function or module that has them.
        names: the attributes, with spaces between them.
        used_by: a module of the library that uses them, below `transformers_kad/`.
        made: makes what is looked at out of the owner, where instances alone have the attributes.
    """

    owner: str
    names: str
    used_by: str
    made: Callable[[Any], Any] = lambda owner: owner

    def messages(self) -> list[str]:
        """What has moved."""
        try:
            found = self.made(resolve(self.owner))
        except (AttributeError, ImportError, TypeError) as error:
            return [moved(self.owner, f"can't be used as before ({error})", self.used_by)]
        missing = [name for name in self.names.split() if not hasattr(found, name)]
        return [moved(f"{self.owner}.{name}", "is missing", self.used_by) for name in missing]


def _made(**arguments: Any) -> Callable[[Any], Any]:
    return lambda owner: owner(**arguments)


def _compiled(optimized_module: Any) -> Any:
    compiled = torch.compile(torch.nn.Linear(1, 1))
    if not isinstance(compiled, optimized_module):
        raise TypeError(f"torch.compile returned a {type(compiled).__name__}")
    return compiled


def _with_hook(add_hook: Any) -> Any:
    module = torch.nn.Linear(1, 1)
    add_hook(module, importlib.import_module("accelerate.hooks").AlignDevicesHook())
    return module


_CACHES = "transformers.cache_utils."
CACHE = "cache" if IS_5_24 else "past_key_values"

ATTRIBUTES = (
    Attributes("transformers.PreTrainedModel", "_can_compile_fullgraph", "models/attention_masks.py"),
    Attributes("transformers.PreTrainedModel", "_supports_attention_backend", "models/forward_inputs.py"),
    Attributes("transformers.PreTrainedModel", "_device_mesh", "decoding/parallel.py"),
    Attributes("transformers.PreTrainedConfig", "_attn_implementation", "models/static_masks.py", _made()),
    Attributes("transformers.PreTrainedConfig", "_name_or_path", "models/model_errors.py", _made()),
    Attributes("transformers.CompileConfig", "_compile_all_devices", "recipes/benchmarking/methods.py", _made()),
    Attributes(
        "transformers.generation.logits_process.PrefixConstrainedLogitsProcessor",
        "_prefix_allowed_tokens_fn",
        "decoding/call_processors.py",
        _made(prefix_allowed_tokens_fn=lambda row, text: [0], num_beams=1),
    ),
    Attributes(
        "transformers.generation.logits_process.RepetitionPenaltyLogitsProcessor",
        "penalty prompt_ignore_length",
        "decoding/call_processors.py",
        _made(penalty=1.1),
    ),
    Attributes("transformers.MaxLengthCriteria", "max_length", "decoding/speculative_rows.py", _made(max_length=1)),
    Attributes("transformers.EosTokenCriteria", "eos_token_id", "decoding/ended_rows.py", _made(eos_token_id=1)),
    Attributes("transformers.LogitsProcessor", "supports_continuous_batching", "logits_process.py"),
    Attributes(
        _CACHES + "Cache",
        "batch_select_indices crop get_seq_length is_croppable reorder_cache",
        "models/cache_rollback.py",
    ),
    Attributes(_CACHES + "Cache", "is_compileable", "models/attention_masks.py"),
    Attributes(_CACHES + "DynamicCache", "layers", "models/cache_rollback.py", _made()),
    Attributes(
        _CACHES + "EncoderDecoderCache",
        "self_attention_cache",
        "models/cache_rollback.py",
        lambda kind: kind(transformers.DynamicCache(), transformers.DynamicCache()),
    ),
    Attributes(
        _CACHES + "DynamicLayer", "get_seq_length is_initialized keys values", "models/cache_rollback.py", _made()
    ),
    Attributes(
        _CACHES + "DynamicSlidingWindowLayer",
        "activate_past_recording cumulative_length is_sliding sliding_window",
        "models/cache_rollback.py",
        _made(sliding_window=4),
    ),
    Attributes(
        _CACHES + "DynamicIndexedLayer",
        "indexer_keys is_indexer_initialized",
        "models/cache_rollback.py",
        _made(),
    ),
    Attributes(
        _CACHES + "LinearAttentionLayer",
        "activate_past_recording conv_kernel_size conv_states is_conv_states_initialized "
        "is_recurrent_states_initialized record_past",
        "models/cache_rollback.py",
        _made(),
    ),
    Attributes(_CACHES + "LinearAttentionLayer", "recurrent_states", "models/recurrent_states.py", _made()),
    Attributes(_CACHES + "LinearAttentionLayer", "has_previous_state", "models/base_model.py", _made()),
    Attributes(
        _CACHES + "StaticLayer",
        "cumulative_length is_initialized max_cache_len",
        "models/static_cache.py",
        _made(max_cache_len=4),
    ),
    Attributes("torch.nn.Linear", "_forward_hooks _forward_pre_hooks", "models/fingerprint.py", lambda c: c(1, 1)),
    Attributes("torch.nn.Linear", "_forward_pre_hooks_with_kwargs", "models/adapters.py", lambda c: c(1, 1)),
    Attributes("torch.nn.Linear", "_modules", "models/adapter_switch.py", lambda c: c(1, 1)),
    Attributes("torch._dynamo", "mark_static_address", "models/static_cache.py"),
    Attributes("torch._dynamo.eval_frame.OptimizedModule", "_orig_mod", "models/model_errors.py", _compiled),
    Attributes("peft.tuners.tuners_utils.BaseTunerLayer", "_disable_adapters", "models/adapter_switch.py"),
    Attributes("peft.tuners.tuners_utils.BaseTunerLayer", "merged_adapters", "models/adapters.py"),
    Attributes("peft.utils.other.AuxiliaryTrainingWrapper", "disable_adapters", "models/adapter_switch.py"),
    Attributes("accelerate.hooks.add_hook_to_module", "_hf_hook", "models/offloading.py", _with_hook),
)


@pytest.mark.parametrize("used", ATTRIBUTES, ids=lambda used: f"{used.owner}-{used.names.split()[0]}")
def test_attributes_exist(used):
    assert not used.messages(), "\n".join(used.messages())


# --- Signatures --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    """The arguments of a function as the library passes or replaces them.

    Attributes:
        function: its dotted name.
        first: the arguments with which its signature begins.
        others: further ones, anywhere in it.
        used_by: a module of the library that relies on it.
    """

    function: str
    first: str
    others: str
    used_by: str

    def messages(self) -> list[str]:
        """What has moved."""
        try:
            names = list(inspect.signature(resolve(self.function)).parameters)
        except (AttributeError, ImportError):
            return [moved(self.function, "is missing", self.used_by)]
        first, others = self.first.split(), self.others.split()
        if names[: len(first)] != first:
            return [moved(self.function, f"has the arguments {names}, which began with {first}", self.used_by)]
        return [
            moved(self.function, f"has no argument `{name}`, but {names}", self.used_by)
            for name in others
            if name not in names
        ]


_MIXIN = "transformers.GenerationMixin."

SIGNATURES = (
    Signature(
        _MIXIN + "generate",
        "self inputs generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn",
        "assistant_model streamer custom_generate kwargs",
        "decoding/generate_wrapper.py",
    ),
    Signature(_MIXIN + "generate_batch", "self inputs generation_config", "kwargs", "decoding/generate_wrapper.py"),
    Signature(_MIXIN + "init_continuous_batching", "self generation_config", "", "decoding/generate_wrapper.py"),
    Signature(
        _MIXIN + "_prepare_position_ids_for_generation",
        "self inputs_tensor model_kwargs",
        "",
        "models/forward_inputs.py",
    ),
    Signature(
        _MIXIN + "prepare_inputs_for_generation",
        "self input_ids",
        f"next_sequence_length is_first_iteration {CACHE} attention_mask kwargs",
        "models/forward_inputs.py",
    ),
    Signature(
        _MIXIN + "_get_logits_processor",
        "self generation_config",
        "logits_processor",
        "integrations/continuous_batching.py",
    ),
    Signature(
        "transformers.masking_utils.create_masks_for_generate",
        "config inputs_embeds attention_mask",
        f"{CACHE} position_ids kwargs",
        "models/attention_masks.py",
    ),
    Signature(
        "transformers.generation.PromptLookupCandidateGenerator",
        "",
        "num_output_tokens max_matching_ngram_size max_length",
        "decoding/prompt_lookup.py",
    ),
    Signature(
        "transformers.generation.PromptLookupCandidateGenerator.get_candidates",
        "self input_ids",
        "",
        "decoding/prompt_lookup.py",
    ),
    Signature(_CACHES + "Cache", "layers", "", "models/static_cache.py"),
    Signature(_CACHES + "Cache.crop", "self tokens_to_remove", "", "models/cache_rollback.py"),
    Signature(_CACHES + "Cache.reorder_cache", "self beam_idx", "", "models/cache_rollback.py"),
    Signature(_CACHES + "StaticCache", "config max_cache_len", "", "models/static_cache.py"),
)


@pytest.mark.parametrize("used", SIGNATURES, ids=lambda used: used.function)
def test_signatures_are_as_before(used):
    assert not used.messages(), "\n".join(used.messages())


# --- What stands in the code of others -------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """Pieces of the code of a function that the library relies on: names of local variables and of closures.

    Attributes:
        function: its dotted name.
        pieces: what its source must contain.
        used_by: a module of the library that relies on it.
    """

    function: str
    pieces: tuple[str, ...]
    used_by: str

    def messages(self) -> list[str]:
        """What has moved."""
        try:
            source = inspect.getsource(inspect.unwrap(resolve(self.function)))
        except (AttributeError, ImportError):
            return [moved(self.function, "is missing", self.used_by)]
        missing = [piece for piece in self.pieces if piece not in source]
        return [moved(self.function, f"no longer contains {piece!r}", self.used_by) for piece in missing]


CODE = (
    Code(_MIXIN + "generate", ("logits_processor", "model_kwargs"), "decoding/refusals.py"),  # local variables
    Code(_MIXIN + "generate", ("decoding_method = custom_generate",), "decoding/speculative.py"),
    Code(
        "peft.tuners.lora.model.LoraModel._enable_peft_forward_hooks",
        (
            "partial(_adapter_names_pre_forward_hook, adapter_names=",
            "partial(_alora_offsets_pre_forward_hook, alora_offsets=",
            "register_forward_pre_hook(",
        ),
        "models/adapters.py",
    ),
    Code(
        "peft.tuners.poly.model.PolyModel._register_pre_hooks",
        ('kwargs["task_ids"] = task_ids',),
        "models/adapters.py",
    ),
    Code("peft.utils.other.AuxiliaryTrainingWrapper", ("self._disable_adapters",), "models/adapter_switch.py"),
)


@pytest.mark.parametrize("used", CODE, ids=lambda used: used.function)
def test_code_of_others_is_as_before(used):
    assert not used.messages(), "\n".join(used.messages())


# --- Overridden methods --------------------------------------------------------------------------------------------

# Methods and settings of classes of the libraries that classes of this library replace.
OVERRIDDEN = {
    "decoding.candidate_generator.KADCandidateGenerator": "get_candidates",
    "decoding.ended_rows.EndedRows": "__call__",
    "decoding.lazy.LazyStep": "__call__",
    "decoding.token_by_token.EagerStep": "__call__",
    "decoding.token_by_token.TokenStep": "__call__",
    "integrations.continuous_batching.ContinuousBatchingKAD": "__call__ fill_defaults prepare_tensor_args",
    "integrations.continuous_batching.KADBatchingManager": "add_request",
    "integrations.serving._OneModel": f"{LIST_MODELS} load_model_and_processor shutdown",
    "logits_process.KADLogitsProcessor": "__call__ supports_continuous_batching",
    "models.attention_masks._Compileable": "is_compileable",
    "models.static_cache.RowLayer": "get_mask_sizes get_seq_length lazy_initialization update",
}


def overridden_by(kind: type) -> dict[str, type]:
    """What a class replaces of a library's class, by name, and the nearest such class that has it."""
    found: dict[str, type] = {}
    for name in vars(kind):
        if not name.startswith("_") or name == "__call__":
            owners = [c for c in kind.__mro__[1:] if c.__module__.split(".")[0] in LIBRARIES and name in vars(c)]
            if owners:
                found[name] = owners[0]
    return found


def classes_of_the_library() -> Iterator[type]:
    import transformers_kad  # noqa: PLC0415 (this module is also run where that fails)

    for module in pkgutil.walk_packages(transformers_kad.__path__, "transformers_kad."):
        if ".recipes" not in module.name and "vllm" not in module.name:
            for kind in vars(importlib.import_module(module.name)).values():
                if isinstance(kind, type) and kind.__module__ == module.name:
                    yield kind


def test_the_overridden_methods_are_those_of_the_list():
    found = {}
    for kind in classes_of_the_library():
        if names := overridden_by(kind):
            found[f"{kind.__module__}.{kind.__qualname__}".removeprefix("transformers_kad.")] = set(names)
    listed = {name: set(names.split()) for name, names in OVERRIDDEN.items()}
    assert found == listed, "A method was renamed in a library, or OVERRIDDEN does not name it."


def override_message(kind: type, name: str) -> str | None:
    """What is wrong with a method of a class of the library that replaces a library's one; None if nothing is."""
    used_by = kind.__module__.removeprefix("transformers_kad.").replace(".", "/") + ".py"
    owner = overridden_by(kind).get(name)
    if owner is None:
        base = next(c for c in kind.__mro__ if c.__module__.split(".")[0] in LIBRARIES)
        return moved(f"{base.__module__}.{base.__qualname__}.{name}", "is missing", used_by)
    theirs = getattr(owner, name)
    if not inspect.isfunction(theirs):
        return None
    parameters = inspect.signature(theirs).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
    ours = inspect.signature(getattr(kind, name))
    ways = ((positional, named), (positional[:1], positional[1:] + named))  # by position and by name
    if any(_takes(ours, by_position, by_name) for by_position, by_name in ways):
        return None
    thing = f"{owner.__module__}.{owner.__qualname__}.{name}"
    return moved(thing, f"has the arguments {[*positional, *named]}, and ours {list(ours.parameters)}", used_by)


def _takes(signature: inspect.Signature, by_position: list[str], by_name: list[str]) -> bool:
    try:
        signature.bind(*by_position, **dict.fromkeys(by_name))
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_take_the_same_arguments(name):
    kind = resolve(f"transformers_kad.{name}")
    messages = [override_message(kind, method) for method in OVERRIDDEN[name].split()]
    assert not any(messages), "\n".join(filter(None, messages))


# --- The lists are complete ----------------------------------------------------------------------------------------

# Private names of other libraries, which have tests of their own.
ELSEWHERE = {
    "_asdict": "named tuples",
    "_batch_scheduler": "lm_eval, see integrations/test_lm_eval.py",
    "_getframe": "the module sys",
    "_replace": "named tuples",
}


def private_names(source: str) -> set[str]:
    """The names with one leading underscore that code reads or writes as attributes of something."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.Subscript(slice=ast.Constant(value=str(name))):  # as in `vars(module)["_modules"]`
                found.add(name)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                found.add(name)
            case ast.Call(
                func=ast.Attribute(attr="get" | "pop" | "setdefault"), args=[ast.Constant(value=str(name)), *_]
            ):
                found.add(name)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def names_given_by(source: str) -> set[str]:
    """The names that code itself gives: to functions, classes, variables, and attributes of its own objects."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
    return found


def test_every_private_name_is_in_the_lists():
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    own = set().union(*map(names_given_by, sources))
    used = {name for source in sources for name in private_names(source) if not name.startswith("_kad_")} - own
    attributes = {name for one in ATTRIBUTES for name in [*one.owner.split("."), *one.names.split()]}
    listed = attributes.union(*(one.function.split(".") for one in (*SIGNATURES, *CODE)))
    assert used <= listed | ELSEWHERE.keys(), f"ATTRIBUTES, SIGNATURES or CODE must name {sorted(used - listed)}."
    assert not ELSEWHERE.keys() - used, "ELSEWHERE names what nothing uses any more."


def test_modules_of_the_lists_use_what_they_are_listed_for():
    for one in ATTRIBUTES:
        source = (PACKAGE / one.used_by).read_text(encoding="utf-8")
        for name in one.names.split():
            assert name in source, f"{one.used_by} does not use {name} of {one.owner}."
    for one in (*SIGNATURES, *CODE):
        assert (PACKAGE / one.used_by).is_file(), one.used_by


# --- What the messages say -----------------------------------------------------------------------------------------


def test_a_missing_import_is_named(monkeypatch):
    source = "from transformers.cache_utils import StaticLayer\n"
    source += "try:\n    from peft import X\nexcept ImportError:\n    pass\n"
    assert missing_imports(source, "models/static_cache.py") == []
    monkeypatch.delattr(cache_utils, "StaticLayer")
    (message,) = missing_imports(source, "models/static_cache.py")
    assert "cache_utils.StaticLayer` can't be imported. transformers_kad/models/static_cache.py relies" in message
    (message,) = missing_imports("from transformers.no_such_module import X", "x.py")
    assert "`transformers.no_such_module.X` can't be imported" in message


def test_a_missing_attribute_is_named(monkeypatch):
    monkeypatch.delattr(PreTrainedModel, "_can_compile_fullgraph")
    with pytest.raises(
        AssertionError, match=r"_can_compile_fullgraph` is missing\. .*models/attention_masks\.py"
    ) as found:
        test_attributes_exist(ATTRIBUTES[0])
    assert str(found.value).startswith(f"transformers {version('transformers')}: `transformers.PreTrainedModel.")


def test_an_attribute_that_instances_had_is_named(monkeypatch):
    monkeypatch.setattr(
        PrefixConstrainedLogitsProcessor, "__init__", lambda self, prefix_allowed_tokens_fn, num_beams: None
    )
    messages = [message for used in ATTRIBUTES for message in used.messages()]
    assert ["_prefix_allowed_tokens_fn` is missing" in message for message in messages] == [True]
    monkeypatch.setattr(PrefixConstrainedLogitsProcessor, "__init__", lambda self: None)
    messages = [message for used in ATTRIBUTES for message in used.messages()]
    assert ["can't be used as before" in message for message in messages] == [True]


def test_another_signature_is_named(monkeypatch):
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, inputs, stopping_criteria, **kwargs: None)
    with pytest.raises(AssertionError, match=r"generate` has the arguments .*decoding/generate_wrapper\.py relies"):
        test_signatures_are_as_before(SIGNATURES[0])
    monkeypatch.setattr(PromptLookupCandidateGenerator, "__init__", lambda self, num_output_tokens, max_length: None)
    used = next(one for one in SIGNATURES if one.function.endswith("PromptLookupCandidateGenerator"))
    with pytest.raises(AssertionError, match="has no argument `max_matching_ngram_size`"):
        test_signatures_are_as_before(used)


def test_a_missing_function_is_named(monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_prepare_position_ids_for_generation")
    messages = [message for used in SIGNATURES for message in used.messages()]
    assert ["_prepare_position_ids_for_generation` is missing" in message for message in messages] == [True]


def test_other_code_is_named(monkeypatch):
    monkeypatch.setattr(GenerationMixin, "generate", lambda self: None)
    with pytest.raises(AssertionError, match="generate` no longer contains 'decoding_method = custom_generate'"):
        test_code_of_others_is_as_before(CODE[1])


def test_an_overridden_method_with_another_signature_is_named(monkeypatch):
    monkeypatch.setattr(LogitsProcessor, "__call__", lambda self, input_ids, scores, positions: scores)
    with pytest.raises(AssertionError, match=r"__call__` has the arguments .*'positions'.*logits_process\.py relies"):
        test_overridden_methods_take_the_same_arguments("logits_process.KADLogitsProcessor")


def test_an_overridden_method_that_was_renamed_is_named(monkeypatch):
    for kind in (cache_utils.StaticLayer, cache_utils.CacheLayerMixin):
        monkeypatch.delattr(kind, "get_mask_sizes")
    with pytest.raises(AssertionError, match=r"StaticLayer\.get_mask_sizes` is missing\. .*models/static_cache\.py"):
        test_overridden_methods_take_the_same_arguments("models.static_cache.RowLayer")
    with pytest.raises(AssertionError, match="OVERRIDDEN"):
        test_the_overridden_methods_are_those_of_the_list()


def test_a_private_name_that_is_not_in_the_lists_is_found(monkeypatch):
    assert private_names("a._x(b._y)\ngetattr(c, '_z')\nvars(d)['_w'] = e.f") == {"_x", "_y", "_z", "_w"}
    assert names_given_by("class _A:\n    def _x(self):\n        self._y = _z = 1") == {"_A", "_x", "_y", "_z"}
    monkeypatch.delitem(ELSEWHERE, "_getframe")
    with pytest.raises(AssertionError, match=r"must name .*'_getframe'"):
        test_every_private_name_is_in_the_lists()
