"""The contract over its reference: what is asked of the real transports can be done."""

from __future__ import annotations

from tests.transfer.contract import TransportContract
from tests.transfer.local import LocalMedium


class TestLocal(TransportContract):
    medium_class = LocalMedium
