#include <iostream>
int main() { long s = 0, x; while (std::cin >> x) s += x; std::cout << s << std::endl; std::cerr << "x"; }
