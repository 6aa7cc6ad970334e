"""Open a real Qwen, rebuild it piece by piece, and check every piece against pretrained weights.

The modules are exported from the course's notebooks. What a user of the package needs most is here
at the top. Each name is fetched when it is first used, so `import qwen_nb` loads no torch.

    from qwen_nb import Qwen, Tokenizer, Chat, generate
    model, tokenizer = Qwen.from_pretrained(), Tokenizer.from_pretrained()
"""

__version__ = "0.1.0"
__all__ = [
    "Chat",
    "Qwen",
    "QwenConfig",
    "Tokenizer",
    "generate",
    "load_lora",
    "max_positions",
    "packaged_model",
    "render_chat",
    "render_folder",
    "save_pretrained",
    "speculate",
    "stream",
]

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors: what `__getattr__` finds
    from .chat import Chat
    from .drafts import speculate
    from .generation import generate, max_positions, stream
    from .inspect import packaged_model
    from .lora import load_lora
    from .model import Qwen, QwenConfig
    from .durable import save_pretrained
    from .prompt import render_folder
    from .template import render_chat
    from .tokenizer import Tokenizer

_HOME = {
    "Chat": "chat",
    "Qwen": "model",
    "QwenConfig": "model",
    "Tokenizer": "tokenizer",
    "generate": "generation",
    "load_lora": "lora",
    "max_positions": "generation",
    "packaged_model": "inspect",
    "render_chat": "template",
    "render_folder": "prompt",
    "save_pretrained": "durable",
    "speculate": "drafts",
    "stream": "generation",
}


def __getattr__(name):
    "Import a name's module when the name is first used, and complete what `help` says of it."
    if name not in _HOME:
        raise AttributeError(f"module 'qwen_nb' has no attribute {name!r}")
    from ._help import document

    value = document(getattr(import_module(f".{_HOME[name]}", __name__), name))
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
