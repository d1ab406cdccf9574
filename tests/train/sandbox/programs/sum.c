#include <stdio.h>
int main(void) { long s = 0, x; while (scanf("%ld", &x) == 1) s += x; printf("%ld\n", s); fputs("x", stderr); return 0; }
