"""The engine on DeepSpeed: ZeRO 0 to 3 and its pipeline, around the project's own modules."""
