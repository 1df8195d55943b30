"""What a pipeline did, for people and for programs: funnel, page, data card, one document."""
