"""data_pipeline: from raw crawl to token store; every document and every drop is accounted for."""
