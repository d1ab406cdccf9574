x <- as.numeric(readLines(file("stdin"))); cat(sum(x), "\n"); message("x")
