"""The table of what operations do with features. To support another one, add it to the table that describes it.

An operation is named as in `torch.ops.aten`. One that is in no table keeps what it is given whole, and nothing is
assumed of what comes out.
"""

from __future__ import annotations

import torch

from structured_tickets.features.calls import Rule
from structured_tickets.features.rules_of_axes import average, norm, padding, pooling, running_sum, softmax
from structured_tickets.features.rules_of_layers import (
    channel_normalisation,
    convolution,
    group_normalisation,
    layer_normalisation,
    linear,
    transposed_convolution,
)
from structured_tickets.features.rules_of_numbers import (
    added_product,
    addition,
    clamped,
    division,
    gated_linear,
    made_anew,
    masked,
    multiplication,
    nonzero,
    paired_up,
    same,
    slopes,
    taken_in_two,
    written,
)
from structured_tickets.features.rules_of_products import added_matrix_product, attention, matrix_product


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SAME = _names(
    """
    _to_copy abs alias asin atan bfloat16 ceil celu clone contiguous detach double dropout dropout_ elu elu_ erf
    expm1 feature_dropout float floor gelu gelu_ half hardshrink hardswish hardswish_ hardtanh hardtanh_
    leaky_relu leaky_relu_ lift_fresh lift_fresh_copy log1p mish mish_ nan_to_num native_dropout neg relu
    relu6 relu_ round rrelu rrelu_ rrelu_with_noise rrelu_with_noise_ rrelu_with_noise_functional selu sign silu silu_
    sin sinh softshrink softsign sqrt sqrt_ square tanh tanh_ tanhshrink
    to trunc type_as zeros_like
    """
)
"""Works on each number by itself, and gives zero for zero."""
NONZERO = _names(
    """
    alpha_dropout bernoulli bernoulli_ cos empty_like eq exp feature_alpha_dropout full_like ge gt hardsigmoid
    hardsigmoid_ le log log_sigmoid lt ne ones_like pow rand_like randn_like reciprocal rsqrt rsub sigmoid sigmoid_
    softplus
    """
)
"""Works on each number by itself, and gives something else than zero for zero."""
POOLING = _names(
    """
    _upsample_nearest_exact2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool2d_with_indices
    max_pool3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    """
)
"""Changes the sizes of the last axes; numbers of one channel stay in it."""
RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME, same),
    **dict.fromkeys(NONZERO, nonzero),
    **dict.fromkeys(POOLING, pooling),
    **dict.fromkeys(_names("add add_ sub sub_ maximum minimum"), addition),
    **dict.fromkeys(_names("mul mul_"), multiplication),
    **dict.fromkeys(_names("addcmul addcmul_"), added_product),
    **dict.fromkeys(_names("div div_"), division),
    **dict.fromkeys(_names("conv1d conv2d conv3d"), convolution),
    **dict.fromkeys(_names("conv_transpose1d conv_transpose2d conv_transpose3d"), transposed_convolution),
    **dict.fromkeys(_names("batch_norm instance_norm"), channel_normalisation),
    **dict.fromkeys(_names("layer_norm rms_norm"), layer_normalisation),
    **dict.fromkeys(_names("mean sum amax amin var std"), average),
    **dict.fromkeys(_names("softmax log_softmax"), softmax),
    **dict.fromkeys(_names("matmul bmm mm"), matrix_product),
    **dict.fromkeys(_names("baddbmm addmm"), added_matrix_product),
    **dict.fromkeys(_names("pad constant_pad_nd"), padding),
    **dict.fromkeys(_names("clamp clamp_ clamp_min clamp_max"), clamped),
    **dict.fromkeys(_names("new_empty new_zeros new_ones new_full"), made_anew),
    "linear": linear,
    "group_norm": group_normalisation,
    "linalg_vector_norm": norm,
    "scaled_dot_product_attention": attention,
    "glu": gated_linear,
    "prelu": slopes,
    "masked_fill": masked,
    "cumsum": running_sum,
    "copy_": written,
    "view_as_complex": paired_up,
    "view_as_real": taken_in_two,
}
"""Operation -> what it does with features."""
LAYERS = _names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear")
"""Makes features of what has none."""
SLOTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(LAYERS, (1, 2)),
    **dict.fromkeys(_names("batch_norm instance_norm"), (1, 2, 3, 4)),
    **dict.fromkeys(_names("layer_norm group_norm rms_norm"), (2, 3)),
}
"""Operation -> which of its arguments are its layer's own parameters and buffers."""

BY_NUMBER = _names("chunk tensor_split channel_shuffle")
"""Rearrangements that divide an axis into equal parts."""
BY_PLACE = _names("flip gather index index_select narrow roll select slice split split_with_sizes unbind unfold")
"""Rearrangements that take positions of an axis by their numbers."""
IN_PARTS = _names("split split_with_sizes")
"""Of these, those that divide an axis into parts of given sizes."""
SHAPING = _names("view reshape flatten unflatten view_as reshape_as _unsafe_view")
"""Rearrangements that leave all numbers in their order."""
REARRANGEMENTS = (
    BY_NUMBER
    | BY_PLACE
    | SHAPING
    | _names(
        """
    T cat concat expand expand_as mT movedim numpy_T permute pixel_shuffle pixel_unshuffle repeat
    repeat_interleave squeeze stack swapaxes t tile transpose unsqueeze
    """
    )
)
"""Moves numbers to other places, or repeats or leaves out some, and computes nothing."""
CHECKS = _names("_assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size")
"""Looks at a tensor, and gives none."""
COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd
"""Key of operations that torch computes by others. Those that no table knows are followed in these steps."""
RANDOM = _names("rand randn rand_like randn_like bernoulli bernoulli_ randint randperm")
"""Draws numbers."""
PARTS = _names("slice select narrow")
"""Gives a part of a tensor along an axis, in the same memory."""
