"""Networks that control a UNet by an image: ControlNets, and the network that joins them with the UNet."""
