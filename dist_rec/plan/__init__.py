"""`dist-rec plan`: will these tables fit that cluster, how, how fast, and if not, what to change."""
