"""Files of networks that control a UNet by an image: their kinds, families and shapes."""
