"""How tests look at an error of the user's."""

import pytest

from rqv2_jax.errors import InputError


def refused(call, *names):
    """The message of the InputError `call` raises: one line that names all of `names`."""
    with pytest.raises(InputError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    for name in names:
        assert str(name) in message, message
    return message
