"""Triton's interpreter without two things that take most of its time and change no result here.

Each call of a function within a kernel replaces Triton's language by the interpreter's, as its launch has done.
Each sum and product of integers is repeated in int64 to find overflow, which these small arrays do not have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield
