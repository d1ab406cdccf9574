package main
import ("fmt"; "os")
func main() { var s, x int; for { if _, e := fmt.Scan(&x); e != nil { break }
s += x }; fmt.Println(s); fmt.Fprintln(os.Stderr, "x") }
