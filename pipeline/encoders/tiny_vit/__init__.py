"""TinyViT: LiteMedSAM and MobileSAM."""
