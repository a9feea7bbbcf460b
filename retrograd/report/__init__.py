"""Pictures and reports, single files that open offline."""
