"""What the kernel takes for granted of a training, tried at its first step; slopes measured without any pullback."""
