"""The device's side of the status field (2.1, 3.1), as a table: how far a driver has come, and what it may ask for there."""

from enum import Enum
from typing import Final

from virtio.spec import Status
from virtio.status import StatusTable


class DeviceState(Enum):
    """How far the driver has come (3.1.1), as the status bits tell."""

    RESET = "reset"
    ACKNOWLEDGE = "acknowledge"
    DRIVER = "driver"
    FEATURES_OK = "features ok"
    DRIVER_OK = "driver ok"
    NEEDS_RESET = "needs reset"
    FAILED = "failed"


class DeviceStep(Enum):
    """What a driver may ask of a device, in any state; and NEED_RESET, which is the device's own."""

    RESET = "reset"
    ACKNOWLEDGE = "setting ACKNOWLEDGE"
    DRIVER = "setting DRIVER"
    ACCEPT = "accepting features"
    FEATURES_OK = "setting FEATURES_OK"
    SETUP_QUEUE = "setting up a queue"
    RESET_QUEUE = "resetting a queue"
    REENABLE_QUEUE = "setting up a queue that was reset"
    WRITE_CONFIG = "writing the configuration"
    DRIVER_OK = "setting DRIVER_OK"
    FAIL = "setting FAILED"
    NEED_RESET = "setting NEEDS_RESET"


_R, _A, _D, _F, _L, _N, _X = DeviceState
# fmt: off
DEVICE_TABLE: Final = StatusTable("device", DeviceState, DeviceStep, {
    #    RESET ACKN. DRIVER ACCEPT F_OK  SETUP RST_Q REENA CONFIG D_OK  FAIL  NEED
    _R: (_R,   _A,   None,  None,  None, None, None, None, None,  None, _X,   _N),
    _A: (_R,   None, _D,    None,  None, None, None, None, None,  None, _X,   _N),
    _D: (_R,   None, None,  _D,    _F,   None, None, None, None,  None, _X,   _N),
    _F: (_R,   None, None,  None,  None, _F,   _F,   _F,   _F,    _L,   _X,   _N),
    _L: (_R,   None, None,  None,  None, None, _L,   _L,   _L,    None, _X,   _N),
    _N: (_R,   None, None,  None,  None, None, None, None, None,  None, _X,   _N),
    _X: (_R,   None, None,  None,  None, None, None, None, None,  None, None, _X),
})
# fmt: on
"""Writing a bit that is set already is no step. Serving queues needs DRIVER_OK (2.1.2)."""

STATUS_STEPS: Final = (
    (Status.ACKNOWLEDGE, DeviceStep.ACKNOWLEDGE),
    (Status.DRIVER, DeviceStep.DRIVER),
    (Status.FEATURES_OK, DeviceStep.FEATURES_OK),
    (Status.DRIVER_OK, DeviceStep.DRIVER_OK),
    (Status.FAILED, DeviceStep.FAIL),
)
"""In the order of the initialization sequence: one write may set several."""

STATES: Final = (
    (Status.FAILED, DeviceState.FAILED),
    (Status.NEEDS_RESET, DeviceState.NEEDS_RESET),
    (Status.DRIVER_OK, DeviceState.DRIVER_OK),
    (Status.FEATURES_OK, DeviceState.FEATURES_OK),
    (Status.DRIVER, DeviceState.DRIVER),
    (Status.ACKNOWLEDGE, DeviceState.ACKNOWLEDGE),
)
"""What a status field says of how far the driver is: the first of these bits that is set."""
