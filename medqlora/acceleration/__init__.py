"""Speed and memory. Nothing here changes a result beyond rounding."""

from medqlora.acceleration.attention import (
    PACKED_ATTENTION,
    cover_padding,
    packed_attention,
    use_packed_attention,
)
from medqlora.acceleration.backbone import (
    find_backbone,
    hidden_states,
    last_hidden,
    prepare_for_training,
)
from medqlora.acceleration.compilation import Acceleration, accelerate, make_room
from medqlora.acceleration.graphs import one_stream

__all__ = [
    "PACKED_ATTENTION",
    "Acceleration",
    "accelerate",
    "cover_padding",
    "find_backbone",
    "hidden_states",
    "last_hidden",
    "make_room",
    "one_stream",
    "packed_attention",
    "prepare_for_training",
    "use_packed_attention",
]
