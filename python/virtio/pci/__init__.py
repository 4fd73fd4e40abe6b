"""PCI functions (4.1): what one is (`function`), its configuration space (`config`), and functions of several kinds."""
