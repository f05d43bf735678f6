"""Loads models by name: a directory, a hub name, a GGUF file or an adapter's directory."""

from __future__ import annotations

import functools
import gc
import os
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from leaf_distill.models.checks import check_causal, input_device, max_positions, warm_up
from leaf_distill.models.memory import free_memory
from leaf_distill.models.placement import (
    BALANCED,
    check_dtype,
    check_in_memory,
    resolve_device,
    resolve_dtype,
)
from leaf_distill.models.quantization import (
    check_quantization,
    is_exact,
    quantization_config,
    stay_differentiable,
)
from leaf_distill.models.source import (
    ModelSource,
    fingerprint_in_memory,
    fingerprint_source,
    locate_model,
    named,
    unreadable,
)
from leaf_distill.models.tokenizer import check_fast, load_tokenizer

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel


class NotLoaded(ValueError):
    """The weights of a model are needed that is known by its fingerprint alone."""


class LazyModel:
    """One model of a run, whose weights are loaded at the first need.

    The place, the configuration, the tokenizer, the dtype and the device are read and checked at
    once. A model in memory is never moved, converted to another dtype or released.

    Args:
        source: a directory, a hub name, a ``.gguf`` file, the directory of an adapter (its base
            model is loaded below it and the two are merged), or a model in memory.
        processing_class: the tokenizer; by default the one that belongs to the source.
        dtype: of the weights; see `resolve_dtype`.
        device: see `resolve_device`.
        trust_remote_code: whether code that comes with the model may run.
        argument: how messages call the model, such as "student".
        fingerprint: of the content, where it is known. The weights are then never read, and need
            not be there.
        quantization: a name of METHODS, by which the weights are rounded as they are loaded.

    Attributes:
        name: of the source, for messages.
        config, tokenizer: as transformers reads them; the tokenizer is a fast one.
        dtype: the resolved dtype, such as "float32".
        device: the resolved device.
        quantization: as it was given.
        exact: whether a row's values do not depend on its batch beyond rounding in float32.
        max_positions: the longest sequence that the model takes, None where it names no limit.
        free_memory: bytes of this machine's memory that were free before the weights were loaded.
            A run plans all its batches by it, whichever model is loaded at that time.

    Raises:
        ValueError: one of these cannot be read, or does not fit.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | PreTrainedModel,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        argument: str = "model",
        fingerprint: str | None = None,
        quantization: str | None = None,
    ) -> None:
        self.argument = argument
        self._known = fingerprint
        check_dtype(dtype)
        self._trust = trust_remote_code
        self.quantization = quantization
        self._source: ModelSource | None = None
        self._model: PreTrainedModel | None = None
        self._checked = True  # by `load_model`
        if isinstance(source, torch.nn.Module):
            self._model = source
            self._checked = False
            if quantization is not None:
                raise ValueError(
                    f"{argument}_quantization: must be left out for a model in memory, got "
                    f"{quantization!r}; load the model with it"
                )
            self.name = str(getattr(source, "name_or_path", "") or type(source).__name__)
            self.config: Any = source.config
            self.dtype = check_in_memory(source, self.name, dtype, device)
            self.device = input_device(source)
        elif not isinstance(source, str | os.PathLike):
            raise ValueError(
                f"source: must be a name or a transformers model, got {source!r}; name a directory"
            )
        else:
            self.name = os.fspath(source)
            with named(argument):
                self._source = locate_model(self.name)
                self.config = _load_config(
                    self._source, trust_remote_code, weights=fingerprint is None
                )
            self.device = resolve_device(device)
            self._place = BALANCED if device == BALANCED else str(self.device)
            self.dtype = _resolve_dtype(self._source, dtype, self.config, self.device)
            if quantization is not None:
                read = fingerprint is None
                check_quantization(quantization, self._source, self.config, argument, weights=read)
        in_8_bits = getattr(source, "is_loaded_in_8bit", False)
        self.exact = is_exact(self.dtype, "bnb8" if in_8_bits else quantization)
        self.max_positions = max_positions(self.config)
        own = self._model.parameters() if self._model is not None else ()
        self.free_memory = free_memory() + sum(
            weight.nbytes for weight in own if weight.device.type == "cpu"
        )
        if processing_class is None:
            with named(argument):
                processing_class = self._load_tokenizer()
        self.tokenizer = processing_class
        check_fast(self.tokenizer, self.name)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        place = self.name if self._source else getattr(self._model, "name_or_path", "")
        try:
            if place:
                return load_tokenizer(place, trust_remote_code=self._trust)
        except ValueError:
            if self._source is not None:
                raise
        raise ValueError(
            f"processing_class: must be the tokenizer of {self.name!r}, a model in memory that "
            "names no place to read one from, got None; pass it"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of the model's content; see `model_fingerprint`, `fingerprint_in_memory`."""
        if self._known is not None:
            return self._known
        if self._source is None:
            return fingerprint_in_memory(self._model)
        return fingerprint_source(self._source)

    @property
    def in_memory(self) -> bool:
        """Whether the model was given as an object."""
        return self._source is None

    def load(self) -> PreTrainedModel:
        """Return the model, which is loaded and checked at the first call.

        Raises:
            NotLoaded: the model was made with a fingerprint.
            ValueError: the weights cannot be read, or the model is not causal.
        """
        if self._known is not None:
            raise NotLoaded(f"{self.argument}: {self.name} is known by its fingerprint alone")
        with named(self.argument):
            if self._model is None:
                self._model = load_model(
                    self.name,
                    dtype=self.dtype,
                    device=self._place,
                    trust_remote_code=self._trust,
                    quantization=self.quantization,
                )
            elif not self._checked:
                stay_differentiable(self._model)
                warm_up()
                check_causal(self._model, self.name)
        self._checked = True
        return self._model

    def release(self) -> None:
        """Free the weights that `load` has read; they are read again at the next need."""
        if self._source is None or self._model is None:
            return
        parts = [weakref.ref(part) for part in self._model.modules()]
        self._model = None
        if any(part() is not None for part in parts):
            gc.collect()  # which reads over all that was imported, for a quarter of a second
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    trainable_adapter: bool = False,
    quantization: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model in eval mode, and check that it is one.

    A GGUF file becomes a plain model that trains and saves like any other.

    Args:
        name: a directory, a hub name, a ``.gguf`` file or the directory of an adapter.
        dtype: of the weights; see `resolve_dtype`.
        device: see `resolve_device`.
        trust_remote_code: whether code that comes with the model may run.
        trainable_adapter: makes an adapter a `peft.PeftModel` that can be trained on. Otherwise the
            adapter is merged into its base model.
        quantization: a name of METHODS, by which the weights are rounded.

    Returns:
        The model on its device. With the device "balanced", a model that is too large for one GPU
        is spread over all of them, the CPU's memory and the disk.

    Raises:
        ValueError: the path is missing, the model is of another kind, weights are missing, or the
            adapter needs the package peft.
    """
    check_dtype(dtype)
    target = resolve_device(device)
    source = locate_model(name)
    config = _load_config(source, trust_remote_code)
    dtype = _resolve_dtype(source, dtype, config, target)
    options: dict[str, Any] = {}
    if quantization is not None:
        check_quantization(quantization, source, config, "model")
        options["quantization_config"] = quantization_config(quantization, dtype)
    if device == BALANCED or quantization is not None:  # rounded weights are best not moved
        options["device_map"] = BALANCED if device == BALANCED else {"": target}
    # For weights on the disk that are not in the checkpoint as they are in the model.
    folder = tempfile.TemporaryDirectory(prefix="leaf-offloaded-") if device == BALANCED else None
    if folder is not None:
        options["offload_folder"] = folder.name
    with without_progress_bars():
        model = _read(source, dtype, trust_remote_code, trainable_adapter, options)
    if "device_map" not in options:
        model = model.to(target)
    if folder is not None:
        model.requires_grad_(False)  # each pass makes the weights anew that are elsewhere
        weakref.finalize(model, folder.cleanup)
    stay_differentiable(model)
    warm_up()
    check_causal(model, name)
    return cast("PreTrainedModel", model)


def _load_config(source: ModelSource, trust_remote_code: bool, *, weights: bool = True) -> Any:
    """Read the configuration of the model below all adapters; refuse another kind of model.

    Args:
        source: the model.
        trust_remote_code: whether its code may run.
        weights: whether they have to be there.
    """
    root = source.root
    try:
        config: Any = AutoConfig.from_pretrained(
            root.place, trust_remote_code=trust_remote_code, **root.arguments
        )
    except Exception as error:  # damaged files raise whatever their parser raises
        raise ValueError(unreadable("model", source.name, error)) from error
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if encoder_decoder or (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote):
        raise ValueError(
            f"model: must be a causal language model, got {source.name!r} of the type "
            f"{config.model_type!r}{', an encoder and decoder' if encoder_decoder else ''}; choose "
            "a decoder"
        )
    files = ("*.safetensors", "*.bin", "*.index.json")
    if weights and root.is_local and root.gguf_file is None and not root.has(*files):
        raise ValueError(
            f"model: must be a directory with weights, got {root.name!r}, which has neither "
            "*.safetensors nor *.bin files; save the model again with save_pretrained"
        )
    return config


def _resolve_dtype(source: ModelSource, dtype: str, config: Any, device: torch.device) -> str:
    if dtype == "auto" and source.root.gguf_file is not None:
        return "float32"
    return resolve_dtype(dtype, config, device)


def _read(
    source: ModelSource, dtype: str, trust: bool, trainable: bool, options: Mapping[str, Any]
) -> Any:
    if source.base is not None:
        return _add_adapter(_read(source.base, dtype, trust, False, options), source, trainable)
    arguments = {**source.arguments, **options}
    if source.gguf_file is not None:  # packed weights can be neither trained nor saved
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.place,
            dtype=dtype,
            trust_remote_code=trust,
            output_loading_info=True,
            **arguments,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files raise whatever their parser raises
        raise ValueError(unreadable("model", source.name, error)) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model: must have all of its weights, got {source.name!r}, which lacks {len(missing)} "
            f"of them, such as {missing[0]!r}; save it again with save_pretrained"
        )
    return model


def _add_adapter(base: Any, source: ModelSource, trainable: bool) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            "model: must be a model without an adapter if the package peft is missing, got the "
            f"adapter {source.name!r}; run: pip install 'leaf-distill[peft]'"
        ) from error
    try:
        with warnings.catch_warnings():
            # peft only warns of an incomplete file, and then leaves those weights untrained.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, source.place, is_trainable=trainable)
        return model if trainable else model.merge_and_unload()
    except Exception as error:  # as transformers, peft raises whatever its parsers raise
        raise ValueError(unreadable("adapter", source.name, error)) from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Switch off the bars with which transformers shows the reading and writing of weights."""
    bars: Any = transformers_logging  # its functions are untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
