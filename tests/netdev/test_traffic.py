"""Real traffic of the kernel's through both ends of a device: every format, buffer kind, offload and transport."""

import pytest

from tests.netdev.cables import DATA, OFFLOADS, Cable
from virtio import NetFeature

CASES = {
    "plain": (),
    "mergeable": (NetFeature.MRG_RXBUF,),
    "offloads": tuple(OFFLOADS),
    "mergeable offloads": (*OFFLOADS, NetFeature.MRG_RXBUF),
}


@pytest.mark.parametrize("transport", ["loopback", "pci"])
@pytest.mark.parametrize("case", CASES)
def test_ping_and_tcp_both_ways(ring_format: str, case: str, transport: str) -> None:
    with Cable(*CASES[case], ring_format=ring_format, transport=transport, mtu=1500) as cable:
        pair = cable.pair()
        cable.ping()
        for back in (False, True):
            before = cable.near.counters("vn0"), cable.far.counters("peer0")
            cable.transfer(back=back)
            after = cable.near.counters("vn0"), cable.far.counters("peer0")
            at = 1 if back else 0  # what a TAP's reader took counts as sent
            frames = after[at]["sent_frames"] - before[at]["sent_frames"]
            size = (after[at]["sent_bytes"] - before[at]["sent_bytes"]) / frames
            assert size > 4000 if "offloads" in case else size <= 1540, f"{size} bytes a frame"
        for end in pair.statistics.values():
            assert not end["transmit"]["drops"] and not end["receive"]["drops"], pair.statistics
        pair.check()


def test_each_interface_by_itself_carries_the_same(ring_format: str) -> None:
    with Cable(*OFFLOADS, NetFeature.MRG_RXBUF, ring_format=ring_format) as cable:
        cable.vn0.start()
        cable.peer0.start()
        cable.ping()
        cable.transfer()
        cable.transfer(back=True)
        assert cable.vn0.running and cable.peer0.running


def test_what_was_counted_goes_on_over_a_stop(ring_format: str) -> None:
    with Cable(ring_format=ring_format) as cable:
        pair = cable.pair()
        cable.ping()
        pair.stop()
        before = cable.vn0.statistics["transmit"]["frames"]
        assert before >= 3 and not cable.vn0.carrier and not pair.running
        pair.start()
        cable.transfer(data=DATA[:100_000])
        assert cable.vn0.statistics["transmit"]["frames"] > before + 60
