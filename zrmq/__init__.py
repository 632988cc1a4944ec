"""zrmq: a durable message broker in Python over ZeroMQ. The public names, each loaded when it is first used.

    import zrmq

    with zrmq.embedded("./data") as fabric, fabric.producer() as producer:
        producer.send("meters", b"21.5", tag="kitchen")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrmq.broker import Broker as Broker
    from zrmq.client.allocation import AllocateAveragely as AllocateAveragely
    from zrmq.client.allocation import AllocateByCircle as AllocateByCircle
    from zrmq.client.allocation import AllocateByConfig as AllocateByConfig
    from zrmq.client.allocation import AllocateConsistentHash as AllocateConsistentHash
    from zrmq.client.allocation import AllocateMachineRoomNearby as AllocateMachineRoomNearby
    from zrmq.client.batch import SendHandle as SendHandle
    from zrmq.consumer import PullConsumer as PullConsumer
    from zrmq.consumer import PushConsumer as PushConsumer
    from zrmq.errors import AddressInUseError as AddressInUseError
    from zrmq.errors import BufferFullError as BufferFullError
    from zrmq.errors import ClosedError as ClosedError
    from zrmq.errors import Code as Code
    from zrmq.errors import ConfigError as ConfigError
    from zrmq.errors import ConsumerGroupNotFoundError as ConsumerGroupNotFoundError
    from zrmq.errors import CorruptedError as CorruptedError
    from zrmq.errors import DamageError as DamageError
    from zrmq.errors import DiskFullError as DiskFullError
    from zrmq.errors import FencedError as FencedError
    from zrmq.errors import FolderLockedError as FolderLockedError
    from zrmq.errors import FolderUnusableError as FolderUnusableError
    from zrmq.errors import ForkedClientError as ForkedClientError
    from zrmq.errors import InvalidArgumentError as InvalidArgumentError
    from zrmq.errors import InvalidFrameError as InvalidFrameError
    from zrmq.errors import NoSessionError as NoSessionError
    from zrmq.errors import NotReadyError as NotReadyError
    from zrmq.errors import OutOfOrderError as OutOfOrderError
    from zrmq.errors import PayloadTooLargeError as PayloadTooLargeError
    from zrmq.errors import RequestRefusedError as RequestRefusedError
    from zrmq.errors import RequestTimeoutError as RequestTimeoutError
    from zrmq.errors import ResourceLimitError as ResourceLimitError
    from zrmq.errors import StoppingError as StoppingError
    from zrmq.errors import StoreFailedError as StoreFailedError
    from zrmq.errors import SubscriptionMismatchError as SubscriptionMismatchError
    from zrmq.errors import TopicNotFoundError as TopicNotFoundError
    from zrmq.errors import UnreachableError as UnreachableError
    from zrmq.errors import ZrmqError as ZrmqError
    from zrmq.fabric import Fabric as Fabric
    from zrmq.fabric import connect as connect
    from zrmq.fabric import embedded as embedded
    from zrmq.message import ConsumeFrom as ConsumeFrom
    from zrmq.message import FlushMode as FlushMode
    from zrmq.message import Message as Message
    from zrmq.message import MessageModel as MessageModel
    from zrmq.message import MessageQueue as MessageQueue
    from zrmq.message import Record as Record
    from zrmq.message import SendReceipt as SendReceipt
    from zrmq.nameserver import NameServer as NameServer
    from zrmq.producer import Producer as Producer
    from zrmq.producer import Receipts as Receipts

__version__ = "0.1.0"

_NAMES = {
    "zrmq.broker": ("Broker",),
    "zrmq.client.allocation": (
        "AllocateAveragely", "AllocateByCircle", "AllocateByConfig", "AllocateConsistentHash", "AllocateMachineRoomNearby",
    ),
    "zrmq.client.batch": ("SendHandle",),
    "zrmq.consumer": ("PullConsumer", "PushConsumer"),
    "zrmq.errors": (
        "AddressInUseError", "BufferFullError", "ClosedError", "Code", "ConfigError", "ConsumerGroupNotFoundError",
        "CorruptedError", "DamageError", "DiskFullError", "FencedError", "FolderLockedError", "FolderUnusableError",
        "ForkedClientError", "InvalidArgumentError", "InvalidFrameError", "NoSessionError", "NotReadyError",
        "OutOfOrderError", "PayloadTooLargeError", "RequestRefusedError", "RequestTimeoutError", "ResourceLimitError",
        "StoppingError", "StoreFailedError", "SubscriptionMismatchError", "TopicNotFoundError", "UnreachableError", "ZrmqError",
    ),
    "zrmq.fabric": ("Fabric", "connect", "embedded"),
    "zrmq.message": ("ConsumeFrom", "FlushMode", "Message", "MessageModel", "MessageQueue", "Record", "SendReceipt"),
    "zrmq.nameserver": ("NameServer",),
    "zrmq.producer": ("Producer", "Receipts"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOMES)]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        """Load a public name from its home, once."""
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module 'zrmq' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(home), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
