"""`python -m virtio` is the command `virtio`."""

import sys

from virtio.cli import main

sys.exit(main())
