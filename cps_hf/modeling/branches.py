"""Any transformers segmentation model as a branch: full-size logits, and how a set of branches is initialised.

A branch uses as many pretrained weights as there are, and no two branches start with the same head:

- a configuration: everything is initialised, with a different seed per branch;
- backbone weights: every branch gets the same backbone, and its head is initialised with a different seed;
- a full checkpoint with the same classes: kept unchanged (`reinit_heads=True` draws new heads). A second branch that
  would have the same head (the same checkpoint, or a copy of it) keeps the backbone and gets a new head;
- a full checkpoint with a different number of classes or other names: kept, except the weights that depend on classes.

A model that is passed as an object is used unchanged.

Heads are initialised with kaiming normal (fan-in, relu), heads without norm layers with torch's default, and heads of
universal models by the library's rule (see initialization.py). The first two also apply if the library initialises the
rest from a configuration. The choice is logged, one message per branch, by the logger "cps_hf".
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel

from ..functional import IGNORE_INDEX, StridedLogits
from .backbones import backbone_parameters, head_parameters, load_backbone_weights
from .classes import (
    by_number,
    checked_id2label,
    has_other_names,
    listed,
    reject_classes_of_another_task,
    settle_classes,
)
from .initialization import branch_seed, head_has_norms, initialize_weights
from .set_loss import Layer, LayerQueries, seeds_of
from .twins import redraw_equal_heads
from .universal import (
    UNIVERSAL,
    auto_class,
    decoder_module,
    input_window,
    is_universal,
    pixel_outputs,
    reject_other_universal,
    switch_masked_attention_off,
)

HEAD_NAMES = ("neck", "decode_head", "segmentation_head", "head", "decoder")
"""The name of the module in transformers' models (and this package's) that takes the backbone's feature maps.
A DPT has a neck before its head."""

logger = logging.getLogger("cps_hf")


class Branch(nn.Module):
    """A segmentation model whose logits have the size of its input.

    Args:
        model: any model of `AutoModelForSemanticSegmentation`, or a Mask2Former, MaskFormer or EoMT of
            `AutoModelForUniversalSegmentation`, whose queries give class scores (universal.py); kept as `.model`.
            `align_corners` comes from its configuration, false by default.

    Attributes:
        window: (height, width) of the only images that the model accepts if its positions fit one size, else `None`.
        keep_queries: whether strided logits with gradient carry the predictions that the model's own set loss needs.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.align_corners = bool(getattr(model.config, "align_corners", False))
        self._feature_dropout = _FeatureDropout()
        self.scores, self.window = is_universal(model.config), input_window(model.config)
        head = next((getattr(model, name) for name in HEAD_NAMES if hasattr(model, name)), None)
        head = decoder_module(model) if self.scores else head
        self.keep_queries = False
        self._has_head = head is not None
        self._compiled = None
        if head is not None:
            head.register_forward_pre_hook(self._feature_dropout, with_kwargs=True)

    def compile_model(self, **options) -> None:
        """Compile the model for training mode. `options` are passed to torch.compile."""
        self._compiled = torch.compile(self.model.__call__, **options)

    def forward(
        self,
        pixel_values: Tensor,
        *,
        feature_dropout: float = 0.0,
        complementary_dropout: float = 0.0,
        resize: bool = True,
        layers: list[Layer] | None = None,
    ) -> Tensor:
        """Compute logits at the size of the input.

        Args:
            pixel_values: (B, 3, H, W) float, normalised.
            feature_dropout: the probability in [0, 1) of zeroing a whole channel of the feature maps that enter the
                decode head, independently per image; the others are divided by 1 - p (UniMatch, CVPR 2023,
                section 3.3). Also active in evaluation mode.
            complementary_dropout: the images are pairs of views: the first half of the batch, then the second half in
                the same order. Dropout applies to this share in [0, 1] of the pairs (rounded up, drawn at random).
                Each channel of their feature maps is doubled in one view and zeroed in the other, or the reverse, with
                equal probability (UniMatch V2, TPAMI 2025, has 0.5). Also active in evaluation mode. Maps with equally
                many channels share a draw: those of a vision transformer are one stream, where a channel is only gone
                if it is gone in all of them.
            resize: if false, return what `strided` resizes: the model's logits or class scores at its own size.
            layers: a list to which a universal model's predictions are appended, one `Layer` each.

        Returns:
            (B, C, H, W) float32: resized bilinearly, with `align_corners`.

        Raises:
            ValueError: a dropout is out of range, both are given, `complementary_dropout` is used with an odd number
                of images, or the model has no known decode head.
        """
        if not 0 <= feature_dropout < 1:
            raise ValueError(f"`feature_dropout` must be a probability in [0, 1), got {feature_dropout}.")
        if not 0 <= complementary_dropout <= 1:
            raise ValueError(f"`complementary_dropout` must be a share in [0, 1], got {complementary_dropout}.")
        if complementary_dropout > 0 and feature_dropout > 0:
            raise ValueError("`feature_dropout` and `complementary_dropout` cannot be combined: set one of them to 0.")
        if complementary_dropout > 0 and len(pixel_values) % 2:
            raise ValueError(
                f"`complementary_dropout` needs two views of each image, an even number, got {len(pixel_values)}."
            )
        dropout = "complementary_dropout" if complementary_dropout > 0 else "feature_dropout"
        if max(feature_dropout, complementary_dropout) > 0 and not self._has_head:
            raise ValueError(
                f"{dropout} needs a module that takes the backbone's feature maps, called one of "
                f"{', '.join(HEAD_NAMES)}; {type(self.model).__name__} has "
                f"{', '.join(name for name, _ in self.model.named_children())}. Use a method without feature dropout."
            )
        self._feature_dropout.p, self._feature_dropout.complementary = feature_dropout, complementary_dropout
        network = self._compiled if self._compiled is not None and self.training else self.model
        try:
            values = pixel_outputs(self.model, pixel_values.to(next(self.model.parameters()).dtype), network, layers)
        finally:
            self._feature_dropout.p = self._feature_dropout.complementary = 0.0
        return self._strided(values, pixel_values).resized() if resize else values

    def strided(self, pixel_values: Tensor, **dropout: float) -> StridedLogits:
        """The logits at the model's own size, with the size of the input. Losses resize them piecewise."""
        layers: list[Layer] | None = [] if self.keep_queries and torch.is_grad_enabled() else None
        logits = self._strided(self(pixel_values, **dropout, resize=False, layers=layers), pixel_values)
        if not layers:
            return logits
        return logits._replace(queries=LayerQueries(self.model, layers, seeds_of(pixel_values)))

    def _strided(self, values: Tensor, pixel_values: Tensor) -> StridedLogits:
        return StridedLogits(values, tuple(pixel_values.shape[-2:]), self.align_corners, self.scores)


class _FeatureDropout:
    """A forward pre-hook, registered once and controlled by `p` and `complementary`, so that compiled or wrapped
    models keep their hooks."""

    def __init__(self):
        self.p = self.complementary = 0.0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        if self.p == 0 and self.complementary == 0:
            return None
        drop = self._drop_channels if self.p > 0 else _ComplementaryDropout(self.complementary)
        return _of_maps(drop, args), {name: _of_maps(drop, value) for name, value in kwargs.items()}

    def _drop_channels(self, maps: Tensor) -> Tensor:
        return F.dropout2d(maps, self.p) if maps.ndim == 4 else F.dropout1d(maps, self.p)


class _ComplementaryDropout:
    """The draw of one pass: which pairs are dropped, and the factors for each number of channels."""

    def __init__(self, share: float):
        self.share = share
        self._whole: Tensor | None = None  # bool (pairs,), true where nothing is dropped
        self._factors: dict[int, Tensor] = {}  # (2 * pairs, channels)

    def __call__(self, maps: Tensor) -> Tensor:
        """(2 * pairs, channels, ...)"""
        pairs, channels, device = maps.shape[0] // 2, maps.shape[1], maps.device
        if self._whole is None:
            self._whole = torch.randperm(pairs, device=device) < math.floor(pairs * (1 - self.share))
        if channels not in self._factors:
            first = 2.0 * (torch.rand(pairs, channels, device=device) < 0.5)
            first = first.masked_fill(self._whole.unsqueeze(1), 1.0)
            self._factors[channels] = torch.cat([first, 2 - first])
        factors = self._factors[channels].to(maps.dtype)
        return maps * factors.view(*factors.shape, *[1] * (maps.ndim - 2))


def _of_maps(function, value):
    """Apply `function` to every feature map inside: (B, channels, h, w), or tokens as (B, channels, tokens)."""
    if isinstance(value, (list, tuple)):
        return type(value)(_of_maps(function, item) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 4:
        return function(value)
    if value.ndim == 3:  # (B, tokens, channels)
        return function(value.transpose(1, 2)).transpose(1, 2)
    return value


Source = str | PathLike | PreTrainedConfig | PreTrainedModel


def build_branches(
    models: Source | Sequence[Source],
    *,
    id2label: Mapping[int, str] | None = None,
    num_branches: int | None = None,
    seed: int = 0,
    reinit_heads: bool = False,
    backbone: str | PathLike | Sequence[str | PathLike | None] | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    attn_implementation: str | dict[str, str] | None = None,
    revision: str | None = None,
    masked_attention: bool = False,
) -> list[PreTrainedModel]:
    """The models that will teach each other, and where their weights come from (logged; see the module's docstring).

    Args:
        models: one Hub id, local folder or configuration, used `num_branches` times; or a sequence of these and of
            models. A model object is only checked, and used unchanged.
        id2label: the classes, written into the configuration of every branch that is built. A model object must have
            the same classes, or unnamed ones (LABEL_0, ...). If `None`, the models' classes.
        num_branches: the number of branches if `models` is a single item (default 2).
        seed: together with the branch's index, the seed of its initialisation.
        reinit_heads: draw new heads even if the checkpoint has them.
        backbone: weights for the backbones, see `load_backbone_weights`; a sequence has one per branch.
        trust_remote_code: run the model code in a repository.
        dtype: the parameters' type; if `None`, float32, whatever the checkpoint has.
        attn_implementation: "sdpa", "eager", ..., or {"backbone_config": "sdpa"} for a backbone inside; if `None`, the
            library's choice for each part.
        revision: the revision of a Hub id.
        masked_attention: whether an EoMT without weights starts with masked attention, which its set loss trains.

    Returns:
        The models, all with the same classes, without auxiliary heads, and with 255 as their ignored label.

    Raises:
        ValueError: a source cannot be loaded or has no segmentation head; weights do not match; models share weights;
            their classes differ, or are fewer than 2 or more than 255; or `id2label` is `None` and a checkpoint
            without a segmentation head would have to name the classes.
    """
    sources = source_per_branch(models, num_branches)
    backbones = _backbone_per_branch(backbone, len(sources))
    if id2label is not None:
        id2label = checked_id2label(id2label)
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    build = {"dtype": dtype or torch.float32, "attn_implementation": attn_implementation}
    branches: list[PreTrainedModel] = []
    for index, (source, weights) in enumerate(zip(sources, backbones, strict=True)):
        if isinstance(source, PreTrainedModel):
            if weights is not None or reinit_heads:
                raise ValueError(
                    "`backbone` and `reinit_heads` change weights, but a model object is used unchanged: pass "
                    "its configuration or its folder, or call load_backbone_weights(model, source) yourself."
                )
            branches.append(source)
            said = "the model that was passed, unchanged"
        else:
            model, said = _build(
                source, index, seed, id2label, weights, reinit_heads, options, build, masked_attention
            )
            branches.append(model)
        logger.info("branch %d, %s: %s.", index, type(branches[-1]).__name__, said)
    settle_classes(branches, id2label)
    redraw_equal_heads(branches, [isinstance(source, PreTrainedModel) for source in sources], seed)
    return branches


def _build(
    source, index, seed, id2label, weights, reinit_heads, options, build, masked_attention
) -> tuple[PreTrainedModel, str]:
    """Build one branch. Returns it with a description of what was done."""
    generator_seed = branch_seed(seed, index)
    config = _read_config(source, options)
    own_classes, keeps_head = config.id2label, weights is None and not reinit_heads
    if id2label is None:
        reject_classes_of_another_task(config, _named(source), isinstance(source, PreTrainedConfig))
    config = _adapted_config(config, source, id2label)
    with torch.random.fork_rng(devices=[]):  # leaves other random numbers unaffected
        torch.default_generator.manual_seed(generator_seed)
        from_config = isinstance(source, PreTrainedConfig) or not _has_weights(source)
        if from_config:
            model, said = _from_config(config, options, build), "everything drawn"
            if not masked_attention:
                switch_masked_attention_off(model)
            to_initialize = set() if head_has_norms(model) else head_parameters(model)
        else:
            if getattr(config, "input_shrink", 1) != 1:
                config.input_shrink = 1  # an exported branch shrinks whole photographs; crops are already shrunk
            model, to_initialize, said = _from_checkpoint(source, config, options, build)
            renamed = id2label is not None and keeps_head and has_other_names(own_classes, id2label)
            by_class = _parameters_by_class(config, options) if renamed else set()
            if not by_class <= to_initialize:
                to_initialize |= by_class
                said = f"weights from {source} except for its classes, which have other names"
                logger.warning(
                    "%s has %d classes too, but with other names (%s; these are %s), so its weights for classes are "
                    "not used. To keep them, write these names into its config.json.",
                    *(source, len(own_classes), listed(own_classes), listed(id2label)),
                )
        if weights is not None:
            load_backbone_weights(model, weights)
            said = f"backbone from {weights}"
        if not keeps_head:
            to_initialize = head_parameters(model)
        if to_initialize:
            rule = "kaiming normal" if head_has_norms(model) else "torch's default, as it has no norm layers"
            rule = "the library's own rule" if is_universal(model.config) else rule
            drawn = "head" if to_initialize == head_parameters(model) else _listed(to_initialize)
            said += f", {drawn} drawn by {rule}"
        if to_initialize or from_config:
            said += f" (seed {seed}, branch {index})"
        initialize_weights(model, to_initialize)
    return model.train(), said


def source_per_branch(models: Source | Sequence[Source], num_branches: int | None) -> list[Source]:
    """What each branch is made from. Arguments as in `build_branches`."""
    if isinstance(models, PreTrainedModel):
        models = [models]
    if isinstance(models, (str, PathLike, PreTrainedConfig)):
        count = 2 if num_branches is None else num_branches
        if count < 1:
            raise ValueError(f"`num_branches` must be at least 1, got {num_branches}.")
        return [models] * count
    sources = list(models)
    for source in sources:
        if not isinstance(source, (str, PathLike, PreTrainedConfig, PreTrainedModel)):
            raise ValueError(
                "`models` must be Hub ids, local folders, transformers configurations or transformers models, got "
                f"{type(source).__name__}."
            )
    if not sources:
        raise ValueError("`models` is empty: pass one id, folder or configuration, or a list of them.")
    if num_branches is not None and num_branches != len(sources):
        raise ValueError(f"`models` has {len(sources)} entries, `num_branches` is {num_branches}: remove the latter.")
    return sources


def _backbone_per_branch(backbone, count: int) -> list[str | PathLike | None]:
    if backbone is None or isinstance(backbone, (str, PathLike)):
        return [backbone] * count
    if len(backbone) != count:
        raise ValueError(
            f'`backbone` has {len(backbone)} entries for {count} branches: give one per branch, "none" for none.'
        )
    return list(backbone)


def _is_config_file(source) -> bool:
    return Path(source).is_file() and Path(source).suffix == ".json"


def _has_weights(source: str | PathLike) -> bool:
    """False for a local folder that only contains a configuration."""
    if _is_config_file(source):
        return False
    folder = Path(source)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _read_config(source, options: dict) -> PreTrainedConfig:
    """A copy of the configuration, which must be of a segmentation model."""
    if isinstance(source, PreTrainedConfig):
        config = copy.deepcopy(source)
    else:
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise ValueError(f"The folder `{source}` has no config.json: it is not a transformers model.")
        try:
            config = AutoConfig.from_pretrained(source, **options)
        except (OSError, ValueError, KeyError) as error:
            if Path(source).exists():
                raise ValueError(
                    f"The configuration in `{source}` cannot be read. transformers said: {error}"
                ) from error
            offline = " (HF_HUB_OFFLINE=1 is set)" if constants.HF_HUB_OFFLINE else ""
            raise ValueError(
                f"`{source}` is neither a folder here nor a model that could be read from the Hub. Check the spelling "
                f"and the connection{offline}; a gated or private one needs HF_TOKEN; one with "
                f"its own code needs `trust_remote_code=True`. transformers said: {error}"
            ) from error
    reject_other_universal(config, _named(source))
    known = type(config) in AutoModelForSemanticSegmentation._model_mapping or is_universal(config)
    if not known and "AutoModelForSemanticSegmentation" not in (getattr(config, "auto_map", None) or {}):
        names = sorted({kind.model_type for kind in AutoModelForSemanticSegmentation._model_mapping} | {*UNIVERSAL})
        raise ValueError(
            f"{_named(source)} is a {config.model_type!r}, which has no semantic segmentation head in transformers. "
            f"Types that have one: {', '.join(names)}. To use it as a backbone, pass a UperNetConfig or "
            "DeepLabV3PlusConfig as the model and this as `backbone`."
        )
    if config.model_type == "dpt" and config.backbone_config is not None and not config.is_hybrid:
        raise ValueError(
            f"{_named(source)}: DPTForSemanticSegmentation ignores `backbone_config` and "
            "builds its own ViT. For another backbone, use ViTDPTConfig (a DPT head) or UperNetConfig."
        )
    return config


def _adapted_config(config: PreTrainedConfig, source, id2label: dict[int, str] | None) -> PreTrainedConfig:
    """The configuration with our classes and ignored label, and without auxiliary head."""
    if id2label is None:
        config.id2label = by_number(config.id2label, f"The configuration of {_named(source)}")
    else:
        config.id2label = dict(id2label)
        config.label2id = {name: index for index, name in id2label.items()}
    if hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False  # it would get no gradient from our losses, which stops DDP
    if config.model_type == "maskformer":
        config.use_auxiliary_loss = False  # it makes masks in every layer for the set loss, which is not used
    for field in ("semantic_loss_ignore_index", "loss_ignore_index"):  # the second is UperNet's
        if hasattr(config, field):
            setattr(config, field, IGNORE_INDEX)
    return config


def _from_config(config: PreTrainedConfig, options: dict, build: dict) -> PreTrainedModel:
    kwargs = {name: value for name, value in build.items() if value is not None}
    try:
        model = auto_class(config).from_config(config, trust_remote_code=options["trust_remote_code"], **kwargs)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError) as error:
        hint = "Often the backbone does not return the stages that the head needs (`out_features`, `out_indices`)."
        if "attention implementation" in str(error) or "attn_implementation" in str(error):
            hint = 'For the backbone alone, pass attn_implementation={"backbone_config": ...}, or remove it.'
        raise ValueError(
            f"A {config.model_type!r} cannot be built from its configuration. {hint} The library said: "
            f"{type(error).__name__}: {error}"
        ) from error
    return model


def _from_checkpoint(source, config: PreTrainedConfig, options: dict, build: dict):
    """The model, the names of parameters that the checkpoint did not fill, and a description of what was done."""
    kwargs = {name: value for name, value in {**options, **build}.items() if value is not None}
    try:
        model, info = auto_class(config).from_pretrained(
            source, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"`{source}` cannot be loaded. transformers said: {type(error).__name__}: {error}") from error
    names = {name for name, _ in model.named_parameters()}
    mismatched = {key[0] for key in info["mismatched_keys"]}
    new = (set(info["missing_keys"]) | mismatched) & names
    backbone_names = backbone_parameters(model)
    if backbone_names and backbone_names <= new:
        raise ValueError(
            f"`{source}` has no weight of the backbone of {type(model).__name__}. If it is a backbone, pass the "
            f"segmentation model's configuration as the model and `{source}` as `backbone`."
        )
    if lost := new & backbone_names:
        logger.warning("%s lacks these weights of the backbone, which are drawn: %s.", source, _listed(lost))
    head_names = names - backbone_names
    if not new:
        return model, new, f"all weights from {source}"
    if mismatched:
        return model, new, f"weights from {source} except for the class count (now {config.num_labels})"
    if head_names <= new:
        return model, new, f"backbone from {source}"
    return model, new, f"weights from {source}"


def _parameters_by_class(config: PreTrainedConfig, options: dict) -> set[str]:
    """The names of parameters that depend on classes: their shapes change with the number of classes.

    Found by comparing two models without values (on the meta device), one of which has one more class.
    """
    shapes = []
    for count in (config.num_labels, config.num_labels + 1):
        other = copy.deepcopy(config)
        other.num_labels = count
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = auto_class(other).from_config(other, trust_remote_code=options["trust_remote_code"])
        shapes.append({name: parameter.shape for name, parameter in model.named_parameters()})
    return {name for name, shape in shapes[0].items() if shapes[1].get(name) != shape}


def _named(source) -> str:
    return type(source).__name__ if isinstance(source, PreTrainedConfig) else f"`{source}`"


def _listed(names: set[str], most: int = 6) -> str:
    shown = sorted(names)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
