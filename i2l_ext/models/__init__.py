"""The models: which there are, where their files lie, how they are downloaded."""
