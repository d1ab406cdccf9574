using System;
class P { static void Main() { long s = 0; string l; while ((l = Console.ReadLine()) != null)
s += long.Parse(l); Console.WriteLine(s); Console.Error.WriteLine("x"); } }
