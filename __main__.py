from rob.cli import main

main()
