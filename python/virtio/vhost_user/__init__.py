"""vhost-user: `backend.Backend` serves devices of ours to virtual machines. The rest is the protocol, usable by itself.

`message` is the codec, `backend_session` and `frontend_session` are the two ends as state machines: bytes and descriptors go in, bytes,
descriptors and effects come out, and nothing there opens, reads or closes a descriptor. `socket` and `connection` do.

The protocol is that of QEMU's docs/interop/vhost-user.rst; names are that text's with their prefix dropped.
"""
