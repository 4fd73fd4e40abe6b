"""Feature negotiation between both ends: what is accepted, and refusals that name bit and reason (2.2, 3.1.1)."""

from enum import IntEnum

import pytest

from virtio import Device, DeviceId, DeviceQueue, Driver, Feature, FeatureNegotiationError, Features, Requires, Status, StatusError
from virtio.device import RING_FEATURES, DeviceState
from virtio.driver import DriverState
from virtio.transport.loopback import LoopbackTransport


class ToyFeature(IntEnum):
    BASE = 0
    EXTRA = 1
    OTHER = 55
    FUTURE = 127


RULES = (Requires(ToyFeature.EXTRA, ToyFeature.BASE, section="5.0"),)


class Toy(Device):
    device_id = DeviceId.ENTROPY
    queues = ("queue",)
    features = (ToyFeature.BASE, ToyFeature.EXTRA, ToyFeature.FUTURE)
    rules = RULES

    def on_queue(self, queue: DeviceQueue) -> None:
        pass


class ToyDriver(Driver):
    rules = RULES


def at_driver_state(device: Device) -> Device:
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    return device


def test_required_and_wanted_features_are_accepted_and_nothing_else() -> None:
    device = Toy()
    driver = ToyDriver(LoopbackTransport(device))
    accepted = driver.negotiate(required={Feature.VERSION_1, ToyFeature.FUTURE}, wanted={ToyFeature.BASE, ToyFeature.OTHER})
    assert accepted == driver.features == device.accepted == {32, 127, 0}
    assert driver.state is DriverState.FEATURES_OK and device.state is DeviceState.FEATURES_OK


def test_version_1_is_always_offered_and_always_required() -> None:
    device = Toy(offered={ToyFeature.BASE})
    assert device.offered == {0, 32}
    assert ToyDriver(LoopbackTransport(device)).negotiate() == {32}

    class Legacy(LoopbackTransport):
        def offered(self) -> Features:
            return super().offered() - {Feature.VERSION_1}

    with pytest.raises(FeatureNegotiationError, match=r"VERSION_1 \(bit 32\) is not offered"):
        ToyDriver(Legacy(Toy())).negotiate()


def test_a_required_feature_that_is_not_offered_is_named_and_the_device_given_up() -> None:
    device = Toy()
    driver = ToyDriver(LoopbackTransport(device))
    with pytest.raises(FeatureNegotiationError, match=r"OTHER \(bit 55\) is not offered by the device") as refusal:
        driver.negotiate(required={ToyFeature.OTHER}, wanted={ToyFeature.BASE})
    assert refusal.value.missing == {55} and refusal.value.offered == device.offered
    assert driver.state is DriverState.FAILED and Status.FAILED in device.status
    assert not driver.features
    with pytest.raises(StatusError, match="allowed there: reset, check, close"):
        driver.negotiate()
    driver.reset()
    assert driver.negotiate(wanted={ToyFeature.BASE}) == {0, 32}


def test_a_required_feature_without_what_it_needs_is_named_with_its_section() -> None:
    driver = ToyDriver(LoopbackTransport(Toy(offered={ToyFeature.BASE, ToyFeature.EXTRA})))
    with pytest.raises(FeatureNegotiationError, match=r"EXTRA \(bit 1\) needs BASE \(bit 0\), which nobody asked for \(5\.0\)") as refusal:
        driver.negotiate(required={ToyFeature.EXTRA})
    assert refusal.value.missing == {1}


def test_a_wanted_feature_without_what_it_needs_is_left_out() -> None:
    assert ToyDriver(LoopbackTransport(Toy())).negotiate(wanted={ToyFeature.EXTRA}) == {32}


def test_features_of_other_transports_are_not_offered_by_this_one() -> None:
    device = Toy(offered={Feature.SR_IOV, Feature.ADMIN_VQ, Feature.NOTIFICATION_DATA, ToyFeature.BASE})
    assert LoopbackTransport(device).offered() == {0, 32}


@pytest.mark.parametrize("bit", [24, 25, 27, 30, 31, 43, 44, 49])
def test_bits_that_are_never_negotiated_are_the_callers_mistake(bit: int) -> None:
    driver = ToyDriver(LoopbackTransport(Toy()))
    with pytest.raises(ValueError, match=rf"bit {bit}\b.*never negotiated"):
        driver.negotiate(wanted={bit})
    with pytest.raises(ValueError, match=rf"bit {bit}\b.*never negotiated"):
        Toy(offered={bit})
    assert driver.state is DriverState.NEW


def test_a_device_offers_no_feature_without_what_it_requires() -> None:
    with pytest.raises(ValueError, match="EXTRA requires BASE"):
        Toy(offered={ToyFeature.EXTRA})
    assert RING_FEATURES < Toy().offered


def test_device_04_features_that_were_not_offered_do_not_stick() -> None:
    device = at_driver_state(Toy(offered={ToyFeature.BASE}))
    device.accept(device.offered | {ToyFeature.OTHER})
    device.write_status(device.status | Status.FEATURES_OK)
    assert device.status == Status.ACKNOWLEDGE | Status.DRIVER
    assert "OTHER (bit 55) was accepted but not offered" in str(device.refused)
    device.accept(device.offered)
    device.write_status(device.status | Status.FEATURES_OK)
    assert Status.FEATURES_OK in device.status and device.refused is None


def test_device_04_features_without_what_they_need_do_not_stick() -> None:
    device = at_driver_state(Toy())
    device.accept(Features({Feature.VERSION_1, ToyFeature.EXTRA}))
    device.write_status(device.status | Status.FEATURES_OK)
    assert Status.FEATURES_OK not in device.status
    assert "EXTRA (bit 1) needs BASE (bit 0), not accepted (5.0)" in str(device.refused)


def test_device_04_a_legacy_driver_gets_no_further() -> None:
    device = at_driver_state(Toy())
    device.write_status(device.status | Status.FEATURES_OK)
    assert Status.FEATURES_OK not in device.status
    assert "VERSION_1 (bit 32)" in str(device.refused)


def test_device_04_features_are_frozen_at_features_ok() -> None:
    device = at_driver_state(Toy())
    chosen = Features({Feature.VERSION_1})
    device.accept(chosen)
    device.write_status(device.status | Status.FEATURES_OK)
    for status in (Status(0), Status.DRIVER_OK):
        device.write_status(device.status | status)
        with pytest.raises(StatusError, match="accepting features is out of order"):
            device.accept(device.offered)
        assert device.accepted == chosen


def test_the_driver_reads_features_ok_back() -> None:
    class Stricter(Toy):
        rules = (Requires(ToyFeature.BASE, ToyFeature.FUTURE, section="5.0"),)

    device = Stricter()
    driver = ToyDriver(LoopbackTransport(device))
    with pytest.raises(FeatureNegotiationError, match=r"does not keep FEATURES_OK.*BASE \(bit 0\)") as refusal:
        driver.negotiate(wanted={ToyFeature.BASE})
    assert refusal.value.missing == {0, 32}
    assert Status.FAILED in device.status and Status.FEATURES_OK not in device.status


def test_the_same_features_are_accepted_again_after_a_reset() -> None:
    driver = ToyDriver(LoopbackTransport(Toy()))
    first = driver.negotiate(wanted={ToyFeature.BASE, Feature.RING_PACKED})
    driver.reset()
    assert not driver.features
    assert driver.negotiate(wanted={ToyFeature.BASE, Feature.RING_PACKED}) == first
