use std::io::Read;
fn main() { let mut t = String::new(); std::io::stdin().read_to_string(&mut t).unwrap();
let s: i64 = t.split_whitespace().map(|x| x.parse::<i64>().unwrap()).sum(); println!("{}", s); eprintln!("x"); }
