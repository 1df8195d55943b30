"""Settings of the data pipeline; YAML groups under ``conf/pipeline`` fill them."""
