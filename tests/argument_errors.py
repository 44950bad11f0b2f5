"""What the error of a bad argument has to say, and names for parametrised cases."""

from collections.abc import Callable
from typing import Any

import pytest


def name_of(value: object) -> str | None:
    """A parameter's test id: the name of a function, or a text itself."""
    return getattr(value, "__name__", value if isinstance(value, str) else "")


def assert_names_argument(
    function: Callable, arguments: dict[str, Any], argument: str, error: type[Exception], text: str
) -> None:
    """The call raises `error`; its message begins with the argument and holds `text`."""
    with pytest.raises(error) as caught:
        function(**arguments)
    assert argument in str(caught.value).split(": ")[0]
    assert text in str(caught.value)
