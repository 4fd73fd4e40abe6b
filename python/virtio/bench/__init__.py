"""The bodies of the benchmarks (extra `virtio[bench]`): each measures one thing and checks its own result. `benches/` runs them."""
