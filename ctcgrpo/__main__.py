from ctcgrpo.cli import main

main()
