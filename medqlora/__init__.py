"""QLoRA of Gemma-2B on medical multiple-choice questions."""

import logging

__version__ = "0.1.0"

# On the CPU bitsandbytes looks for a faster kernel on the hub and warns when the finder is not
# installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
