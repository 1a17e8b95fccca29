"""Networks at their real size, as files."""
