"""vhost-user without I/O: `message` is the codec, `backend_session` and `frontend_session` are the two ends as state machines.

The protocol is that of QEMU's docs/interop/vhost-user.rst; names are that text's with their prefix dropped. Nothing here opens, reads or
closes a descriptor: bytes and descriptors go in, bytes, descriptors and effects come out.
"""
