"""One arm behind an OpenAI-compatible endpoint: ``prunetune serve``.

What asks for ``fastapi``, ``uvicorn`` or ``prometheus_client`` is imported when it is first used: ``prunetune[serve]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunetune.lazy import importer

if __name__ != "prunetune.serving":
    raise ImportError("import prunetune.serving, not serving: a second name would load everything twice")

if TYPE_CHECKING:
    from prunetune.serving.app import build_app as build_app
    from prunetune.serving.run import serve as serve
    from prunetune.serving.servable import embeds_servable as embeds_servable

_HOMES = {"build_app": "app", "embeds_servable": "servable", "serve": "run"}

__all__ = list(_HOMES)
__getattr__ = importer(__name__, _HOMES)
