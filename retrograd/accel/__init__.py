"""Optional accelerators behind doors of the kernel."""
