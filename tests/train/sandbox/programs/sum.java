import java.util.*;
public class Main { static class Sum { long s; void add(long x) { s += x; } }
public static void main(String[] a) { Scanner in = new Scanner(System.in); Sum s = new Sum();
while (in.hasNextLong()) s.add(in.nextLong()); System.out.println(s.s); System.err.println("x"); } }
