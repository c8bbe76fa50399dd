"""What a layout will hold, send and take before anything is started (`headway plan`), and what to do without memory."""
