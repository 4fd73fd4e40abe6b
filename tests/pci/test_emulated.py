"""The emulated function, register by register: what a driver of somebody else's would see, and hostile writes (device-01, -03, -04)."""

from collections.abc import Iterator

import pytest

from tests.pci.devices import CONFIG, Numbers
from virtio import EventFd, Memory, StatusError, TransportError
from virtio.devices.rng import RngDevice
from virtio.pci.config import NO_VECTOR, CfgType, Common, Field, Layout, capabilities, parse
from virtio.pci.emulated import EmulatedFunction
from virtio.spec import Feature, Status

READY = Status.ACKNOWLEDGE | Status.DRIVER
SIZE = 64


class Registers:
    """The driver's side by hand: a register at a time."""

    def __init__(self, function: EmulatedFunction) -> None:
        self.function = function
        self.space = b"".join(function.config_read(offset, 4).to_bytes(4, "little") for offset in range(0, 256, 4))
        self.layout: Layout = parse(self.space, function.bars)
        self.memory = Memory(1 << 16)
        self.address = function.attach(self.memory)

    def read(self, field: Field) -> int:
        low = self.function.bar_read(4, field.offset, min(field.width, 4))
        return low | self.function.bar_read(4, field.offset + 4, 4) << 32 if field.width == 8 else low

    def write(self, field: Field, value: int) -> None:
        self.function.bar_write(4, field.offset, min(field.width, 4), value & 0xFFFF_FFFF)
        if field.width == 8:
            self.function.bar_write(4, field.offset + 4, 4, value >> 32)

    def negotiate(self, *features: Feature) -> None:
        self.write(Common.DEVICE_STATUS, READY)
        for word in range(4):
            bits = sum(1 << bit % 32 for bit in (Feature.VERSION_1, *features) if bit // 32 == word)
            self.write(Common.DRIVER_FEATURE_SELECT, word)
            self.write(Common.DRIVER_FEATURE, bits)
        self.write(Common.DEVICE_STATUS, READY | Status.FEATURES_OK)
        assert self.read(Common.DEVICE_STATUS) == READY | Status.FEATURES_OK

    def enable(self, index: int, size: int = 8) -> None:
        self.write(Common.QUEUE_SELECT, index)
        self.write(Common.QUEUE_SIZE, size)
        for number, field in enumerate((Common.QUEUE_DESC, Common.QUEUE_DRIVER, Common.QUEUE_DEVICE)):
            self.write(field, self.address + 0x3000 * index + 0x1000 * number)
        self.write(Common.QUEUE_ENABLE, 1)

    def queue_state(self) -> list[int]:
        fields = (Common.QUEUE_SIZE, Common.QUEUE_ENABLE, Common.QUEUE_DESC, Common.QUEUE_DRIVER, Common.QUEUE_DEVICE)
        return [self.read(field) for field in fields]


@pytest.fixture
def function() -> Iterator[EmulatedFunction]:
    with EmulatedFunction(Numbers()) as function:
        yield function


@pytest.fixture
def registers(function: EmulatedFunction) -> Registers:
    return Registers(function)


# Configuration space.


def test_ids_and_class_are_a_modern_devices(function: EmulatedFunction) -> None:
    assert function.config_read(0, 4) == 0x1044_1AF4
    assert function.config_read(8, 4) == 0x00FF00_01, "revision 1 or above (4.1.2.1)"
    assert function.config_read(0x2C, 2) == 0x1AF4 and function.config_read(0x2E, 2) >= 0x40
    assert function.config_read(0x3D, 1) == 1
    for offset in (0, 2, 8, 0x2C, 0x34, 0x3D):
        function.config_write(offset, 1, 0x55)
    assert function.config_read(0, 4) == 0x1044_1AF4, "read-only"


def test_configuration_space_has_4_kib(function: EmulatedFunction) -> None:
    assert function.config_read(4092, 4) == 0
    for offset, width in ((4096, 1), (4095, 2), (4094, 4), (-1, 1), (1, 2), (2, 4), (0, 3), (0, 8)):
        with pytest.raises(ValueError, match="not in configuration space"):
            function.config_read(offset, width)
        with pytest.raises(ValueError, match="not in configuration space"):
            function.config_write(offset, width, 0)
    with pytest.raises(ValueError, match="does not fit"):
        function.config_write(4, 1, 256)


def test_every_capability_is_there_and_read_only(function: EmulatedFunction, registers: Registers) -> None:
    kinds = [each.body[3] for each in capabilities(registers.space) if each.id == 9]
    assert kinds == [CfgType.COMMON, CfgType.ISR, CfgType.DEVICE, CfgType.NOTIFY, CfgType.PCI]
    common = registers.layout.common.place
    for offset in range(16):
        function.config_write(common + offset, 1, 0xFF)
    assert function.config_read(common, 4) == int.from_bytes(registers.space[common : common + 4], "little")
    assert registers.layout.msix is not None and registers.layout.msix.size == 4


def test_bars_are_sized_and_moved(function: EmulatedFunction) -> None:
    bars = dict(function.bars)
    assert bars[1].kind == "memory32" and bars[4].kind == "memory64" and bars[4].prefetchable
    for bar in bars.values():
        assert bar.address and bar.address % bar.size == 0
    for register in (0x14, 0x20, 0x24):
        function.config_write(register, 4, 0xFFFF_FFFF)
    assert function.config_read(0x14, 4) == (-bars[1].size & 0xFFFF_FFFF)
    assert function.config_read(0x24, 4) << 32 | function.config_read(0x20, 4) == (-bars[4].size & (1 << 64) - 1) | 0b1100
    for register in (0x10, 0x18, 0x1C, 0x30):
        function.config_write(register, 4, 0xFFFF_FFFF)
        assert function.config_read(register, 4) == 0, "no BAR there"
    function.config_write(0x14, 4, 0xD000_0123)
    function.config_write(0x20, 4, 0x1234_5678)
    function.config_write(0x24, 4, 0x12)
    assert function.bars[1].address == 0xD000_0000 and function.bars[4].address == 0x12_1234_5678 & -bars[4].size
    assert [function.bars[index].size for index in (1, 4)] == [bars[1].size, bars[4].size]


def test_bars_are_off_while_the_command_register_says_so(function: EmulatedFunction, registers: Registers) -> None:
    function.config_write(4, 2, 0)
    assert dict(function.bars) == {} and function.bar_read(4, 0, 4) == 0xFFFF_FFFF
    function.bar_write(4, Common.DEVICE_STATUS.offset, 1, 1)
    function.config_write(4, 2, 2)
    assert registers.read(Common.DEVICE_STATUS) == 0 and set(function.bars) == {1, 4}


@pytest.mark.parametrize(
    ("bar", "offset", "width"), [(0, 0, 4), (5, 0, 4), (6, 0, 1), (-1, 0, 1), (4, 1, 2), (4, -4, 4), (4, 0, 8), (4, 1 << 20, 4)]
)
def test_accesses_outside_a_bar_are_the_callers_mistake(function: EmulatedFunction, bar: int, offset: int, width: int) -> None:
    with pytest.raises(ValueError, match="BAR"):
        function.bar_read(bar, offset, width)
    with pytest.raises(ValueError, match="BAR"):
        function.bar_write(bar, offset, width, 0)
    with pytest.raises(ValueError, match="BAR"):
        function.doorbell(bar, offset, width, 0)


def window(function: EmulatedFunction, place: int, bar: int, offset: int, length: int, value: int | None = None) -> int:
    """An access by way of PCI_CFG."""
    function.config_write(place + 4, 1, bar)
    function.config_write(place + 8, 4, offset)
    function.config_write(place + 12, 4, length)
    if value is not None:
        function.config_write(place + 16, length, value)
    return function.config_read(place + 16, 4) & (1 << 8 * length) - 1 if length in (1, 2, 4) else function.config_read(place + 16, 4)


def test_everything_can_be_reached_through_the_pci_cfg_window(function: EmulatedFunction, registers: Registers) -> None:
    place = registers.layout.pci_cfg
    assert place is not None and registers.layout.device is not None
    assert window(function, place, 4, Common.NUM_QUEUES.offset, 2) == 3
    assert window(function, place, 4, Common.DEVICE_STATUS.offset, 1, READY) == READY == registers.read(Common.DEVICE_STATUS)
    assert window(function, place, 4, registers.layout.device.offset, 4) == int.from_bytes(CONFIG[:4], "little")
    assert window(function, place, 4, Common.DRIVER_FEATURE_SELECT.offset, 4, 3) == 3
    notify = registers.layout.notify.offset
    bell = function.doorbell(4, notify + 4, 2, 1)
    window(function, place, 4, notify + 4, 2, 1)
    assert bell.drain() == 1
    window(function, place, 1, 12, 4, 0)
    assert window(function, place, 1, 12, 4) == 0 == function.bar_read(1, 12, 4)


@pytest.mark.parametrize(("bar", "offset", "length"), [(0, 0, 4), (6, 0, 1), (255, 0, 4), (4, 1, 2), (4, 0xFFFF_FFFC, 4), (4, 1 << 20, 1)])
def test_a_window_to_nowhere_reads_0(function: EmulatedFunction, registers: Registers, bar: int, offset: int, length: int) -> None:
    place = registers.layout.pci_cfg
    assert place is not None
    assert window(function, place, bar, offset, length, 0xFF) == 0
    for length in (0, 3, 5, 8, 0xFFFF_FFFF):
        function.config_write(place + 12, 4, length)
        function.config_write(place + 16, 4, 0x0102_0304)
        assert function.config_read(place + 16, 4) == 0x0102_0304, "no access: bytes only"


# The common configuration.


def test_feature_words_are_compared_at_full_width(function: EmulatedFunction, registers: Registers) -> None:
    words = []
    for select in (0, 1, 2, 3, 4, 0x1_0000, 0x8000_0001, 0xFFFF_FFFF):
        registers.write(Common.DEVICE_FEATURE_SELECT, select)
        assert registers.read(Common.DEVICE_FEATURE_SELECT) == select
        words.append(registers.read(Common.DEVICE_FEATURE))
    assert words[:4] == list(function.device.offered.words) and words[4:] == [0] * 4
    registers.write(Common.DEVICE_STATUS, READY)
    for select in (4, 0x1_0001, 0xFFFF_FFFF):
        registers.write(Common.DRIVER_FEATURE_SELECT, select)
        registers.write(Common.DRIVER_FEATURE, 1)
        assert registers.read(Common.DRIVER_FEATURE) == 0
    assert function.device.accepted == set()


def test_registers_answer_at_their_own_width_only(function: EmulatedFunction, registers: Registers) -> None:
    registers.negotiate()
    assert function.bar_read(4, Common.NUM_QUEUES.offset, 1) == 0 == function.bar_read(4, Common.CONFIG_MSIX_VECTOR.offset, 4)
    assert function.bar_read(4, Common.DEVICE_STATUS.offset, 4) == 0 == function.bar_read(4, Common.DEVICE_FEATURE.offset + 2, 2)
    function.bar_write(4, Common.DEVICE_STATUS.offset, 4, 0)
    function.bar_write(4, Common.DEVICE_STATUS.offset, 2, 0)
    assert registers.read(Common.DEVICE_STATUS) != 0
    function.bar_write(4, Common.QUEUE_SIZE.offset, 4, 8 | 1 << 16)
    function.bar_write(4, Common.QUEUE_SIZE.offset, 1, 8)
    function.bar_write(4, Common.QUEUE_DESC.offset, 2, 8)
    function.bar_write(4, 60, 4, 1)
    assert registers.queue_state() == [SIZE, 0, 0, 0, 0]
    assert function.bar_read(4, 0x800, 4) == 0


def test_read_only_registers_stay(registers: Registers) -> None:
    fields = (Common.DEVICE_FEATURE, Common.NUM_QUEUES, Common.CONFIG_GENERATION, Common.QUEUE_NOTIFY_OFF, Common.ADMIN_QUEUE_NUM)
    before = [registers.read(field) for field in fields]
    for field in fields:
        registers.write(field, 0x7F)
    assert [registers.read(field) for field in fields] == before


@pytest.mark.parametrize("size", [0, 3, 48, 65, 128, 32768, 0xFFFF])
def test_device_01_a_size_that_a_queue_may_not_have_is_ignored(registers: Registers, size: int) -> None:
    registers.negotiate()
    registers.write(Common.QUEUE_SIZE, size)
    assert registers.read(Common.QUEUE_SIZE) == SIZE
    registers.enable(0, size)
    assert registers.queue_state()[:2] == [SIZE, 1], "the greatest size, as nothing lower was written"


def test_device_01_a_packed_ring_may_have_any_size(registers: Registers) -> None:
    registers.negotiate(Feature.RING_PACKED)
    registers.enable(0, 48)
    assert registers.queue_state()[:2] == [48, 1]


@pytest.mark.parametrize("index", [3, 4, 0x8000, 0xFFFF])
def test_device_03_a_queue_that_is_not_there_reads_0_and_writes_nothing(
    function: EmulatedFunction, registers: Registers, index: int
) -> None:
    registers.negotiate(Feature.RING_RESET)
    registers.enable(0)
    before = registers.queue_state()
    registers.write(Common.QUEUE_SELECT, index)
    fields = [field for field in vars(Common).values() if isinstance(field, Field) and 24 <= field.offset < 60]
    for field in fields:
        assert registers.read(field) == 0
        registers.write(field, 1)
        assert registers.read(field) == 0
    registers.write(Common.QUEUE_SELECT, 0)
    assert registers.queue_state() == before
    registers.write(Common.QUEUE_SELECT, 1)
    assert registers.queue_state() == [SIZE, 0, 0, 0, 0]


@pytest.mark.parametrize("live", [False, True])
def test_device_03_an_enabled_queue_is_frozen(function: EmulatedFunction, registers: Registers, live: bool) -> None:
    registers.negotiate()
    registers.enable(0)
    if live:
        registers.write(Common.DEVICE_STATUS, READY | Status.FEATURES_OK | Status.DRIVER_OK)
    before, queue = registers.queue_state(), function.device.queue(0)
    assert before[:2] == [8, 1] and queue is not None
    for field in (Common.QUEUE_SIZE, Common.QUEUE_DESC, Common.QUEUE_DRIVER, Common.QUEUE_DEVICE):
        registers.write(field, 4)
    for value in (0, 1, 2):
        registers.write(Common.QUEUE_ENABLE, value)
    assert registers.queue_state() == before and function.device.queue(0) is queue
    registers.write(Common.DEVICE_STATUS, 0)
    registers.write(Common.QUEUE_SELECT, 0)
    assert registers.queue_state() == [SIZE, 0, 0, 0, 0] and function.device.queue(0) is None


def test_device_03_a_queue_is_enabled_in_order_only(function: EmulatedFunction, registers: Registers) -> None:
    registers.enable(0)
    assert registers.read(Common.QUEUE_ENABLE) == 0, "before FEATURES_OK"
    registers.negotiate()
    registers.write(Common.DEVICE_STATUS, READY | Status.FEATURES_OK | Status.DRIVER_OK)
    registers.enable(1)
    assert registers.read(Common.QUEUE_ENABLE) == 0, "after DRIVER_OK"
    assert function.device.status == READY | Status.FEATURES_OK | Status.DRIVER_OK, "ignored, as registers do"


def test_device_03_areas_outside_memory_enable_nothing(registers: Registers) -> None:
    registers.negotiate()
    registers.enable(0)
    for place in (0, registers.address + 1, registers.address + (1 << 16) - 16, (1 << 64) - 16):
        registers.write(Common.QUEUE_SELECT, 1)
        registers.write(Common.QUEUE_DESC, place)
        registers.write(Common.QUEUE_ENABLE, 1)
        assert registers.read(Common.QUEUE_ENABLE) == 0 and registers.read(Common.QUEUE_DESC) == place


def test_a_queue_is_reset_by_its_register(function: EmulatedFunction, registers: Registers) -> None:
    registers.negotiate(Feature.RING_RESET)
    registers.write(Common.QUEUE_RESET, 1)
    registers.enable(0)
    registers.write(Common.QUEUE_MSIX_VECTOR, 1)
    for value in (0, 2, 0xFFFF):
        registers.write(Common.QUEUE_RESET, value)
    assert registers.read(Common.QUEUE_ENABLE) == 1
    registers.write(Common.QUEUE_RESET, 1)
    assert registers.queue_state() == [SIZE, 0, 0, 0, 0] and registers.read(Common.QUEUE_RESET) == 0
    assert registers.read(Common.QUEUE_MSIX_VECTOR) == NO_VECTOR
    registers.enable(0, 16)
    assert registers.queue_state()[:2] == [16, 1]


def test_device_04_what_was_not_offered_here_does_not_stick() -> None:
    class More(RngDevice):
        features = (Feature.NOTIFICATION_DATA, 127)

    with EmulatedFunction(More()) as function:
        registers = Registers(function)
        registers.write(Common.DEVICE_FEATURE_SELECT, 1)
        assert not registers.read(Common.DEVICE_FEATURE) >> Feature.NOTIFICATION_DATA - 32 & 1
        registers.write(Common.DEVICE_STATUS, READY)
        registers.write(Common.DRIVER_FEATURE_SELECT, 1)
        registers.write(Common.DRIVER_FEATURE, 1 | 1 << Feature.NOTIFICATION_DATA - 32)
        registers.write(Common.DEVICE_STATUS, READY | Status.FEATURES_OK)
        assert registers.read(Common.DEVICE_STATUS) == READY
        registers.write(Common.DRIVER_FEATURE, 1)
        registers.write(Common.DEVICE_STATUS, READY | Status.FEATURES_OK)
        assert registers.read(Common.DEVICE_STATUS) == READY | Status.FEATURES_OK
        registers.write(Common.DRIVER_FEATURE, 3)
        assert registers.read(Common.DRIVER_FEATURE) == 1, "frozen"


def test_status_writes_out_of_order_are_ignored(registers: Registers) -> None:
    for value in (Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK | Status.ACKNOWLEDGE, 0x40, 0x20):
        registers.write(Common.DEVICE_STATUS, value)
        assert registers.read(Common.DEVICE_STATUS) == 0
    registers.negotiate()
    registers.write(Common.DEVICE_STATUS, READY)
    assert registers.read(Common.DEVICE_STATUS) == READY | Status.FEATURES_OK, "only a reset clears bits"


def test_the_generation_changes_once_for_what_was_not_seen(function: EmulatedFunction, registers: Registers) -> None:
    before = registers.read(Common.CONFIG_GENERATION)
    for _ in range(256):
        function.device.change_config(bytes(12))
    assert registers.read(Common.CONFIG_GENERATION) == (before + 1) % 256 == registers.read(Common.CONFIG_GENERATION)


def test_device_configuration_at_any_width(function: EmulatedFunction, registers: Registers) -> None:
    device = registers.layout.device
    assert device is not None
    for width in (1, 2, 4):
        data = b"".join(function.bar_read(4, device.offset + at, width).to_bytes(width, "little") for at in range(0, 16, width))
        assert data == CONFIG + bytes(4)
    function.bar_write(4, device.offset, 1, 0xAA)
    assert function.bar_read(4, device.offset, 1) == CONFIG[0], "before FEATURES_OK"
    registers.negotiate()
    function.bar_write(4, device.offset, 1, 0xAA)
    function.bar_write(4, device.offset + 4, 4, 0xAA)
    function.bar_write(4, device.offset + 12, 4, 0xAA)
    assert function.bar_read(4, device.offset, 4) == 0x131211AA and function.device.config[4:] == CONFIG[4:]


# Notifications, both ways.


@pytest.mark.parametrize("multiplier", [0, 2, 4, 4096])
def test_a_doorbell_is_its_queues_own_store(multiplier: int) -> None:
    with EmulatedFunction(Numbers(), notify_multiplier=multiplier) as function:
        notify = Registers(function).layout.notify
        assert notify.multiplier == multiplier and notify.length >= 2 * multiplier + 2
        bells = [function.doorbell(4, notify.offset + index * multiplier, 2, index) for index in range(3)]
        assert len({bell.fileno() for bell in bells}) == 3
        for index in range(3):
            function.bar_write(4, notify.offset + index * multiplier, 2, index)
            assert [bell.drain() for bell in bells] == [int(index == each) for each in range(3)]
        for offset, width, value in ((0, 2, 3), (0, 4, 0), (0, 1, 0), (0, 2, 0xFFFF), (4, 2, 0), (notify.length - 2, 2, 1)):
            function.bar_write(4, notify.offset + offset, width, value)
            function.doorbell(4, notify.offset + offset, width, value).signal()
        assert [bell.drain() for bell in bells] == [0, 0, 0]


@pytest.mark.parametrize(
    "option", [{"notify_multiplier": 1}, {"notify_multiplier": 6}, {"notify_multiplier": -2}, {"msix_vectors": -1}, {"msix_vectors": 2049}]
)
def test_options_out_of_range_are_refused(option: dict[str, int]) -> None:
    device = Numbers()
    with pytest.raises(ValueError, match=str(next(iter(option.values())))):
        EmulatedFunction(device, **option)  # type: ignore[arg-type]
    EmulatedFunction(device).close()


def use(function: EmulatedFunction, index: int) -> None:
    """Lets the device tell that queue `index` has a used buffer."""
    queue = function.device.queue(index)
    assert queue is not None
    driver = function.device.memory
    available = queue.areas[1]
    position = driver.load(available + 2, 2)
    driver.store(queue.areas[0] + 8, 4, 1)
    driver.store(queue.areas[0], 8, queue.areas[0] + 0x800)
    driver.store(queue.areas[0] + 12, 2, 2)
    driver.store(available + 2, 2, (position + 1) % 65536)
    function.device.poll()


def live(function: EmulatedFunction, registers: Registers, *vectors: int) -> None:
    registers.negotiate()
    for index, vector in enumerate(vectors):
        registers.enable(index)
        registers.write(Common.QUEUE_MSIX_VECTOR, vector)
    registers.write(Common.DEVICE_STATUS, READY | Status.FEATURES_OK | Status.DRIVER_OK)


@pytest.mark.parametrize("vector", [4, 5, 0x7FF, 0x8000, 0xFFFE, 0xFFFF])
def test_a_vector_outside_the_table_is_refused(registers: Registers, vector: int) -> None:
    for field in (Common.CONFIG_MSIX_VECTOR, Common.QUEUE_MSIX_VECTOR):
        assert registers.read(field) == NO_VECTOR
        registers.write(field, 3)
        assert registers.read(field) == 3
        registers.write(field, vector)
        assert registers.read(field) == NO_VECTOR


def test_vectors_pend_while_they_are_masked(function: EmulatedFunction, registers: Registers) -> None:
    msix = registers.layout.msix
    assert msix is not None
    assert [function.bar_read(1, 16 * vector + 12, 4) for vector in range(4)] == [1] * 4, "masked at first"
    targets = function.enable_msix(3)
    assert [function.bar_read(1, 16 * vector + 12, 4) for vector in range(4)] == [0, 0, 0, 1]
    live(function, registers, 1, 2, 3)

    def pending() -> int:
        return function.bar_read(1, msix.pending_offset, 4)

    use(function, 0)
    assert [target.drain() for target in targets] == [0, 1, 0] and pending() == 0
    function.bar_write(1, 16 + 12, 4, 1)
    use(function, 0)
    use(function, 2)
    assert [target.drain() for target in targets] == [0, 0, 0] and pending() == 0b1010
    function.config_write(msix.place + 2, 2, 0xC000)  # the function mask
    function.bar_write(1, 16 + 12, 4, 0)
    use(function, 1)
    assert [target.drain() for target in targets] == [0, 0, 0] and pending() == 0b1110
    function.config_write(msix.place + 2, 2, 0x8000)
    assert [target.drain() for target in targets] == [0, 1, 1] and pending() == 0b1000
    registers.write(Common.DEVICE_STATUS, 0)
    assert pending() == 0
    function.bar_write(1, msix.pending_offset, 4, 0xFFFF_FFFF)
    assert pending() == 0, "read-only"


def test_a_queue_without_a_vector_interrupts_nobody(function: EmulatedFunction, registers: Registers) -> None:
    targets = function.enable_msix(4)
    live(function, registers, NO_VECTOR)
    use(function, 0)
    assert not any(target.wait(0) for target in targets)
    registers.write(Common.QUEUE_SELECT, 0)
    registers.write(Common.QUEUE_MSIX_VECTOR, 2)
    use(function, 0)
    assert [target.wait(0) for target in targets] == [False, False, True, False]


def test_interrupts_are_enabled_once(function: EmulatedFunction) -> None:
    for vectors in (0, 5):
        with pytest.raises(TransportError, match=f"{vectors} MSI-X vectors"):
            function.enable_msix(vectors)
    with pytest.raises(ValueError, match="vector 0"):
        function.mask_vector(0, True)
    function.enable_msix(1)
    for call in (lambda: function.enable_msix(1), lambda: function.enable_intx(lambda: None)):
        with pytest.raises(StatusError, match="enabled already"):
            call()
    function.disable_interrupts()
    function.disable_interrupts()
    function.enable_intx(lambda: None)
    with pytest.raises(StatusError, match="enabled already"):
        function.enable_msix(1)


def test_the_isr_tells_queues_from_configuration_and_reading_clears_it(function: EmulatedFunction, registers: Registers) -> None:
    isr = registers.layout.isr.offset
    live(function, registers, NO_VECTOR)

    def status_bit() -> int:
        return function.config_read(6, 2) >> 3 & 1

    assert status_bit() == 0
    use(function, 0)
    assert status_bit() == 1 and function.bar_read(4, isr, 4) == 0, "one byte"
    assert [function.bar_read(4, isr, 1) for _ in range(2)] == [1, 0] and status_bit() == 0
    function.device.change_config(bytes(12))
    assert function.bar_read(4, isr, 1) == 2
    use(function, 0)
    function.device.change_config(bytes(12))
    assert status_bit() == 1
    function.bar_write(4, isr, 1, 0)
    assert function.bar_read(4, isr, 1) == 3


def test_the_pin_calls_its_handler_until_the_isr_is_read(function: EmulatedFunction, registers: Registers) -> None:
    isr = registers.layout.isr.offset
    live(function, registers, NO_VECTOR)
    told = EventFd()
    bits: list[int] = []

    def handler() -> None:
        bits.append(function.bar_read(4, isr, 1))
        told.signal()

    function.enable_intx(handler)
    use(function, 0)
    assert told.wait(60) and told.drain() and bits == [1]
    function.config_write(4, 2, 0x402)  # Interrupt Disable
    function.device.change_config(bytes(12))
    assert function.config_read(6, 2) & 8 and bits == [1]
    function.config_write(4, 2, 0x002)
    assert told.wait(60) and bits == [1, 2]
    function.disable_interrupts()
    use(function, 0)
    assert bits == [1, 2] and function.bar_read(4, isr, 1) == 1
    told.close()


def test_a_handler_that_never_lowers_the_line_is_given_up(function: EmulatedFunction, registers: Registers) -> None:
    live(function, registers, NO_VECTOR)
    calls: list[None] = []
    enough = EventFd()

    def handler() -> None:
        calls.append(None)
        if len(calls) == 1000:
            enough.signal()

    function.enable_intx(handler)
    use(function, 0)
    assert enough.wait(60)
    function.disable_interrupts()
    assert len(calls) == 1000
    enough.close()


def test_a_closed_function_refuses_everything() -> None:
    function = EmulatedFunction(Numbers())
    function.close()
    function.close()
    function.disable_interrupts()
    for call in (
        lambda: function.config_read(0, 4),
        lambda: function.config_write(0, 4, 0),
        lambda: function.bar_read(4, 0, 4),
        lambda: function.bar_write(4, 0, 4, 0),
        lambda: function.doorbell(4, 0, 2, 0),
        lambda: function.enable_msix(1),
        lambda: function.enable_intx(lambda: None),
        lambda: function.mask_vector(0, True),
        lambda: function.attach(Memory(4096)),
    ):
        with pytest.raises(StatusError, match="closed"):
            call()
    with Memory(4096) as memory, pytest.raises(ValueError, match="not attached"):
        function.detach(memory)
