"""The bundle: a folder of graphs, weights and a manifest, checked before anything in it is used."""
